/* Gradients of convolutions with strides, channels last: striding.py says what for. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* Channels that are worked on together, the most taps of a kernel, and bytes that stay in a core's own memory. */
enum { LANES = 16, TAPS = 256, NEAR = 1 << 19 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t pairs __attribute__((vector_size(4 * LANES)));

/* LANES numbers from place `i` on: float32, or bfloat16 where `half`, which is the upper half of a float32. */
__attribute__((always_inline)) static inline floats read(const char *from, ptrdiff_t i, const int half) {
    floats found;
    if (half) {
        halves narrow;
        memcpy(&narrow, from + 2 * i, sizeof narrow);
        const words wide = __builtin_convertvector(narrow, words) << 16;
        memcpy(&found, &wide, sizeof found);
    } else {
        memcpy(&found, from + 4 * i, sizeof found);
    }
    return found;
}

/* The same back, rounded to the nearest even. */
__attribute__((always_inline)) static inline void write(char *to, ptrdiff_t i, floats value, const int half) {
    if (!half) {
        memcpy(to + 4 * i, &value, sizeof value);
        return;
    }
#ifdef __AVX512BF16__
    __m512 wide;
    memcpy(&wide, &value, sizeof wide);
    const __m256bh narrow = _mm512_cvtneps_pbh(wide);
#else
    words wide;
    memcpy(&wide, &value, sizeof wide);
    const words rounded = wide + 0x7fff + ((wide >> 16) & 1);
    halves narrow;
    for (int l = 0; l < LANES; l++) narrow[l] = (uint16_t)(rounded[l] >> 16);
#endif
    memcpy(to + 2 * i, &narrow, sizeof narrow);
}

/* `value` where a rectifier that gave `rectified` lets a gradient through, else 0. */
static inline floats gated(floats value, floats rectified, float low, float high) {
    const ints open = (rectified > low) & (rectified < high);
    ints bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= open;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A gradient (B, h, w, C) of what a depthwise convolution gave, through the gate of the rectifier that gave `rectified`
   if there is one, to that of the maps (B, H, W, C) it was given. */
struct work {
    const char *gradient, *rectified;
    char *found;
    const float *weights;
    float low, high;
    ptrdiff_t B, C, H, W, h, w, kh, kw, sy, sx, py, px, dy, dx;
};

/* The taps that a sum is made of: where each stands on the plane of gradients, and its weights. */
struct taps {
    int count;
    ptrdiff_t at[TAPS];
    floats weight[TAPS];
};

/* `n` sums beside each other, from `plane` to every `apart`-th place from `to` on. */
__attribute__((always_inline)) static inline void sums(const struct taps *taps, const floats *plane, const int n,
                                                       char *found, ptrdiff_t to, ptrdiff_t apart, const int half) {
    floats sum[8] = {{0}};
    for (int t = 0; t < taps->count; t++) {
        const floats *here = plane + taps->at[t], weight = taps->weight[t];
        for (int i = 0; i < n; i++) sum[i] += here[i] * weight;
    }
    for (int i = 0; i < n; i++) write(found, to + i * apart, sum[i], half);
}

/* A row of `count` sums. Registers hold eight of them, which each weight is read for once. */
__attribute__((always_inline)) static inline void row_of(const struct taps *taps, const floats *plane, ptrdiff_t count,
                                                         char *found, ptrdiff_t to, ptrdiff_t apart, const int half) {
    ptrdiff_t x = 0;
    for (; x + 8 <= count; x += 8) sums(taps, plane + x, 8, found, to + x * apart, apart, half);
    if (count & 4) sums(taps, plane + x, 4, found, to + x * apart, apart, half), x += 4;
    if (count & 2) sums(taps, plane + x, 2, found, to + x * apart, apart, half), x += 2;
    if (count & 1) sums(taps, plane + x, 1, found, to + x * apart, apart, half);
}

static inline ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
/* A division that rounds down. */
static inline ptrdiff_t floored(ptrdiff_t a, ptrdiff_t b) { return a / b - (a % b < 0); }

/* Rows of maps from `y0` to before `y1`, and those of the gradient from `low` to before `high` that they took part in;
   some of these lie outside. */
struct band {
    ptrdiff_t y0, y1, low, high;
};

static inline struct band band_of(const struct work *w, ptrdiff_t y0, ptrdiff_t y1) {
    const ptrdiff_t reach = w->dy * (w->kh - 1);
    return (struct band){y0, y1, floored(y0 + w->py - reach, w->sy), floored(y1 - 1 + w->py, w->sy) + 1};
}

/* LANES channels from `c` on of a band of picture `b`. `plane` is room for their gradients, with zeros at its sides. */
__attribute__((always_inline)) static inline void channels(const struct work *all, ptrdiff_t b, const struct band *band,
                                                           ptrdiff_t c, floats *plane, ptrdiff_t left, ptrdiff_t across,
                                                           const int half) {
    /* A copy that no write can reach, so that its numbers stay in registers. */
    const struct work w = *all;
    for (ptrdiff_t y = band->low; y < band->high; y++) {
        floats *row = plane + (y - band->low) * across + left;
        const ptrdiff_t at = (b * w.h + y) * w.w * w.C + c;
        if (y < 0 || y >= w.h)
            memset(row, 0, (size_t)w.w * sizeof(floats));
        else if (w.rectified)
            for (ptrdiff_t x = 0; x < w.w; x++) {
                const floats gate = read(w.rectified, at + x * w.C, half);
                row[x] = gated(read(w.gradient, at + x * w.C, half), gate, w.low, w.high);
            }
        else
            for (ptrdiff_t x = 0; x < w.w; x++) row[x] = read(w.gradient, at + x * w.C, half);
    }
    /* A place was read by those taps that met it in steps of the stride: the same ones at every stride-th place. */
    for (ptrdiff_t ry = 0; ry < w.sy && band->y0 + ry < band->y1; ry++)
        for (ptrdiff_t rx = 0; rx < w.sx && rx < w.W; rx++) {
            struct taps taps;
            taps.count = 0;
            for (ptrdiff_t ky = 0; ky < w.kh; ky++)
                for (ptrdiff_t kx = 0; kx < w.kw; kx++) {
                    const ptrdiff_t y = band->y0 + ry + w.py - w.dy * ky, x = rx + w.px - w.dx * kx;
                    if (y % w.sy || x % w.sx) continue;
                    taps.at[taps.count] = (y / w.sy - band->low) * across + left + x / w.sx;
                    memcpy(&taps.weight[taps.count++], w.weights + (ky * w.kw + kx) * w.C + c, sizeof(floats));
                }
            const ptrdiff_t count = (w.W - rx + w.sx - 1) / w.sx;
            for (ptrdiff_t y = band->y0 + ry, i = 0; y < band->y1; y += w.sy, i++)
                row_of(&taps, plane + i * across, count, w.found, ((b * w.H + y) * w.W + rx) * w.C + c, w.sx * w.C,
                       half);
        }
}

/* Asks for rows, in the order of memory: what follows takes some channels of all of them at a time. */
static inline void fetch(const char *from, ptrdiff_t row, ptrdiff_t first, ptrdiff_t end) {
    if (from)
        for (const char *at = from + first * row; at < from + end * row; at += 64) __builtin_prefetch(at, 0, 2);
}

/* See `struct work`; `weights` are (kh, kw, C). C is LANES at least, kh × kw TAPS at most. 0 without memory. */
int depthwise(const void *gradient, const void *rectified, const float *weights, void *found, int half, float low,
              float high, const ptrdiff_t *sizes) {
    const struct work w = {gradient,  rectified, found,     weights,   low,       high,      sizes[0],
                           sizes[1],  sizes[2],  sizes[3],  sizes[4],  sizes[5],  sizes[6],  sizes[7],
                           sizes[8],  sizes[9],  sizes[10], sizes[11], sizes[12], sizes[13]};
    /* How far the taps go beyond the sides of the gradient. */
    const ptrdiff_t left = most(0, -floored(w.px - w.dx * (w.kw - 1), w.sx));
    const ptrdiff_t across = left + most(w.w, (w.W - 1 + w.px) / w.sx + 1);
    /* As many rows as stay near while their channels are gone through; whole strides of them. */
    const ptrdiff_t bytes = half ? 2 : 4, row = w.w * w.C * bytes;
    const ptrdiff_t each = w.W * w.C * bytes + row / w.sy * (rectified ? 2 : 1);
    const ptrdiff_t tall = least((w.H + w.sy - 1) / w.sy, most(1, NEAR / each / w.sy)) * w.sy;
    const ptrdiff_t bands = (w.H + tall - 1) / tall;
    /* No band needs more rows than this, wherever it begins. */
    const size_t room = (size_t)(((tall + w.dy * (w.kh - 1)) / w.sy + 2) * across) * sizeof(floats);
    int done = 1;
#pragma omp parallel reduction(&& : done)
    {
        floats *plane = aligned_alloc(sizeof(floats), room);
        done = plane != NULL;
        if (plane) memset(plane, 0, room);
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < w.B * bands; i++) {
            if (!plane) continue;
            const ptrdiff_t b = i / bands, y0 = i % bands * tall;
            const struct band band = band_of(&w, y0, least(w.H, y0 + tall));
            const ptrdiff_t first = b * w.h + most(0, band.low), end = b * w.h + least(w.h, band.high);
            fetch(w.gradient, row, first, end);
            fetch(w.rectified, row, first, end);
            for (ptrdiff_t g = 0; g < w.C; g += LANES) {
                /* The last channels are done again where there are not as many left: what is written is the same. */
                const ptrdiff_t c = least(g, w.C - LANES);
                if (half)
                    channels(&w, b, &band, c, plane, left, across, 1);
                else
                    channels(&w, b, &band, c, plane, left, across, 0);
            }
        }
        free(plane);
    }
    return done;
}

/* What windows (B, h, w, kh, kw, C) gave to the places that they lie on, added up: maps (B, H, W, C). The windows lie
   `sy` and `sx` apart, the first `py` and `px` outside. 0 without memory. */
int overlap(const void *windows, void *found, int half, const ptrdiff_t *sizes) {
    const ptrdiff_t B = sizes[0], C = sizes[1], H = sizes[2], W = sizes[3], h = sizes[4], w = sizes[5], kh = sizes[6],
                    kw = sizes[7], sy = sizes[8], sx = sizes[9], py = sizes[10], px = sizes[11];
    /* From the first window's side to beyond the last one's. */
    const ptrdiff_t wide = most(W + px, (w - 1) * sx + kw) * C;
    int done = 1;
#pragma omp parallel reduction(&& : done)
    {
        float *row = malloc((size_t)wide * sizeof *row);
        done = row != NULL;
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < B * H; i++) {
            if (!row) continue;
            memset(row, 0, (size_t)wide * sizeof *row);
            for (ptrdiff_t ky = 0; ky < kh; ky++) {
                const ptrdiff_t down = i % H + py - ky;
                if (down < 0 || down % sy || down / sy >= h) continue;
                for (ptrdiff_t x = 0; x < w; x++) {
                    const ptrdiff_t from = ((((i / H) * h + down / sy) * w + x) * kh + ky) * kw * C;
                    float *to = row + x * sx * C;
                    if (half)
                        for (ptrdiff_t j = 0; j < kw * C; j++) {
                            const uint32_t wide_one = (uint32_t)((const uint16_t *)windows)[from + j] << 16;
                            float one;
                            memcpy(&one, &wide_one, sizeof one);
                            to[j] += one;
                        }
                    else
                        for (ptrdiff_t j = 0; j < kw * C; j++) to[j] += ((const float *)windows)[from + j];
                }
            }
            for (ptrdiff_t j = 0; j < W * C; j++) {
                if (half) {
                    uint32_t bits;
                    memcpy(&bits, row + px * C + j, sizeof bits);
                    ((uint16_t *)found)[i * W * C + j] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                } else {
                    ((float *)found)[i * W * C + j] = row[px * C + j];
                }
            }
        }
        free(row);
    }
    return done;
}
