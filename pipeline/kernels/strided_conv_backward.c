/* Input gradients of strided convolutions, channels last; see strided_conv_backward.py. A tap is one position of the
   kernel. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* Channels per vector, maximum number of taps of a kernel, and bytes that fit in the L2 cache of one core. */
enum { LANES = 16, MAX_TAPS = 256, CACHE_BYTES = 1 << 19 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* Read LANES numbers from index `i` on: float32, or with `half` bfloat16 (the upper 16 bits of a float32). */
__attribute__((always_inline)) static inline floats read(const char *source, ptrdiff_t i, const int half) {
    floats value;
    if (half) {
        halves narrow;
        memcpy(&narrow, source + 2 * i, sizeof narrow);
        const words wide = __builtin_convertvector(narrow, words) << 16;
        memcpy(&value, &wide, sizeof value);
    } else {
        memcpy(&value, source + 4 * i, sizeof value);
    }
    return value;
}

/* Write LANES numbers from index `i` on; bfloat16 is rounded to nearest even. */
__attribute__((always_inline)) static inline void write(char *target, ptrdiff_t i, floats value, const int half) {
    if (!half) {
        memcpy(target + 4 * i, &value, sizeof value);
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
    memcpy(target + 2 * i, &narrow, sizeof narrow);
}

/* `value` where low < rectified < high, so that the rectifier passes a gradient, and 0 elsewhere. */
static inline floats gated(floats value, floats rectified, float low, float high) {
    const ints open = (rectified > low) & (rectified < high);
    ints bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= open;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One call of `depthwise`. `gradient` (B, h, w, C) is the gradient of the convolution's output, `rectified` the output
   of the rectifier behind it or NULL, and `output` (B, H, W, C) receives the gradient of the convolution's input. k, s,
   p and d are kernel size, stride, padding and dilation. */
struct job {
    const char *gradient, *rectified;
    char *output;
    const float *weights;
    float low, high;
    ptrdiff_t B, C, H, W, h, w, kh, kw, sy, sx, py, px, dy, dx;
};

/* The taps that contribute to one sum: their offsets in the plane of gradients, and their weights. */
struct taps {
    int count;
    ptrdiff_t offset[MAX_TAPS];
    floats weight[MAX_TAPS];
};

/* Compute `n` adjacent sums and write them from index `target` on, `step` apart. */
__attribute__((always_inline)) static inline void tap_sums(const struct taps *taps, const floats *plane, const int n,
                                                           char *output, ptrdiff_t target, ptrdiff_t step,
                                                           const int half) {
    floats sum[8] = {{0}};
    for (int t = 0; t < taps->count; t++) {
        const floats *source = plane + taps->offset[t], weight = taps->weight[t];
        for (int i = 0; i < n; i++) sum[i] += source[i] * weight;
    }
    for (int i = 0; i < n; i++) write(output, target + i * step, sum[i], half);
}

/* Compute a row of `count` sums, eight at a time: eight fit in registers, and each weight is read once for them. */
__attribute__((always_inline)) static inline void tap_sum_row(const struct taps *taps, const floats *plane,
                                                              ptrdiff_t count, char *output, ptrdiff_t target,
                                                              ptrdiff_t step, const int half) {
    ptrdiff_t x = 0;
    for (; x + 8 <= count; x += 8) tap_sums(taps, plane + x, 8, output, target + x * step, step, half);
    if (count & 4) tap_sums(taps, plane + x, 4, output, target + x * step, step, half), x += 4;
    if (count & 2) tap_sums(taps, plane + x, 2, output, target + x * step, step, half), x += 2;
    if (count & 1) tap_sums(taps, plane + x, 1, output, target + x * step, step, half);
}

static inline ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
/* Division that rounds toward minus infinity. */
static inline ptrdiff_t floor_div(ptrdiff_t a, ptrdiff_t b) { return a / b - (a % b < 0); }

/* Input rows [y0, y1), and the rows [low, high) of the output gradient that depend on them; the latter may extend
   beyond the gradient. */
struct band {
    ptrdiff_t y0, y1, low, high;
};

static inline struct band band_of(const struct job *w, ptrdiff_t y0, ptrdiff_t y1) {
    const ptrdiff_t reach = w->dy * (w->kh - 1);
    return (struct band){y0, y1, floor_div(y0 + w->py - reach, w->sy), floor_div(y1 - 1 + w->py, w->sy) + 1};
}

/* Process LANES channels from `c` on, for one band of image `b`. `plane` is a buffer for their gradients whose left and
   right margins are zero. */
__attribute__((always_inline)) static inline void channels(const struct job *job, ptrdiff_t b, const struct band *band,
                                                           ptrdiff_t c, floats *plane, ptrdiff_t margin,
                                                           ptrdiff_t width, const int half) {
    /* A local copy, which no write can alias, so that its values stay in registers. */
    const struct job w = *job;
    for (ptrdiff_t y = band->low; y < band->high; y++) {
        floats *row = plane + (y - band->low) * width + margin;
        const ptrdiff_t offset = (b * w.h + y) * w.w * w.C + c;
        if (y < 0 || y >= w.h)
            memset(row, 0, (size_t)w.w * sizeof(floats));
        else if (w.rectified)
            for (ptrdiff_t x = 0; x < w.w; x++) {
                const floats gate = read(w.rectified, offset + x * w.C, half);
                row[x] = gated(read(w.gradient, offset + x * w.C, half), gate, w.low, w.high);
            }
        else
            for (ptrdiff_t x = 0; x < w.w; x++) row[x] = read(w.gradient, offset + x * w.C, half);
    }
    /* Input pixels with the same position modulo the stride were read by the same taps. */
    for (ptrdiff_t ry = 0; ry < w.sy && band->y0 + ry < band->y1; ry++)
        for (ptrdiff_t rx = 0; rx < w.sx && rx < w.W; rx++) {
            struct taps taps;
            taps.count = 0;
            for (ptrdiff_t ky = 0; ky < w.kh; ky++)
                for (ptrdiff_t kx = 0; kx < w.kw; kx++) {
                    const ptrdiff_t y = band->y0 + ry + w.py - w.dy * ky, x = rx + w.px - w.dx * kx;
                    if (y % w.sy || x % w.sx) continue;
                    taps.offset[taps.count] = (y / w.sy - band->low) * width + margin + x / w.sx;
                    memcpy(&taps.weight[taps.count++], w.weights + (ky * w.kw + kx) * w.C + c, sizeof(floats));
                }
            const ptrdiff_t count = (w.W - rx + w.sx - 1) / w.sx;
            for (ptrdiff_t y = band->y0 + ry, i = 0; y < band->y1; y += w.sy, i++)
                tap_sum_row(&taps, plane + i * width, count, w.output, ((b * w.H + y) * w.W + rx) * w.C + c, w.sx * w.C,
                       half);
        }
}

/* Prefetch rows [first, end) in memory order: the loop that follows reads them in blocks of channels. */
static inline void prefetch(const char *source, ptrdiff_t row, ptrdiff_t first, ptrdiff_t end) {
    if (source)
        for (const char *line = source + first * row; line < source + end * row; line += 64)
            __builtin_prefetch(line, 0, 2);
}

/* Gradient of a depthwise convolution; see `struct job`. Weights are (kh, kw, C), C >= LANES, kh * kw <= MAX_TAPS.
   Return 0 if memory cannot be allocated. */
int depthwise(const void *gradient, const void *rectified, const float *weights, void *output, int half, float low,
              float high, const ptrdiff_t *sizes) {
    const struct job w = {gradient, rectified, output,   weights,  low,      high,      sizes[0],
                          sizes[1], sizes[2],  sizes[3], sizes[4], sizes[5], sizes[6],  sizes[7],
                          sizes[8], sizes[9],  sizes[10], sizes[11], sizes[12], sizes[13]};
    /* How far the taps reach beyond the left edge of the gradient. */
    const ptrdiff_t margin = larger(0, -floor_div(w.px - w.dx * (w.kw - 1), w.sx));
    const ptrdiff_t width = margin + larger(w.w, (w.W - 1 + w.px) / w.sx + 1);
    /* As many rows as stay in the cache while their channels are processed; a multiple of the stride. */
    const ptrdiff_t bytes = half ? 2 : 4, row = w.w * w.C * bytes;
    const ptrdiff_t bytes_per_row = w.W * w.C * bytes + row / w.sy * (rectified ? 2 : 1);
    const ptrdiff_t band_rows = smaller((w.H + w.sy - 1) / w.sy, larger(1, CACHE_BYTES / bytes_per_row / w.sy)) * w.sy;
    const ptrdiff_t bands = (w.H + band_rows - 1) / band_rows;
    /* Upper bound over all bands. */
    const size_t buffer_size = (size_t)(((band_rows + w.dy * (w.kh - 1)) / w.sy + 2) * width) * sizeof(floats);
    int allocated = 1;
#pragma omp parallel reduction(&& : allocated)
    {
        floats *plane = aligned_alloc(sizeof(floats), buffer_size);
        allocated = plane != NULL;
        if (plane) memset(plane, 0, buffer_size);
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < w.B * bands; i++) {
            if (!plane) continue;
            const ptrdiff_t b = i / bands, y0 = i % bands * band_rows;
            const struct band band = band_of(&w, y0, smaller(w.H, y0 + band_rows));
            const ptrdiff_t first = b * w.h + larger(0, band.low), end = b * w.h + smaller(w.h, band.high);
            prefetch(w.gradient, row, first, end);
            prefetch(w.rectified, row, first, end);
            for (ptrdiff_t g = 0; g < w.C; g += LANES) {
                /* The last block overlaps the one before it if C % LANES > 0, and writes the same values again. */
                const ptrdiff_t c = smaller(g, w.C - LANES);
                if (half)
                    channels(&w, b, &band, c, plane, margin, width, 1);
                else
                    channels(&w, b, &band, c, plane, margin, width, 0);
            }
        }
        free(plane);
    }
    return allocated;
}

/* Add up overlapping windows (B, h, w, kh, kw, C) to maps (B, H, W, C), as col2im does. The windows are `sy` and `sx`
   apart, and the first one begins `py` and `px` outside the maps. Return 0 if memory cannot be allocated. */
int overlap(const void *windows, void *output, int half, const ptrdiff_t *sizes) {
    const ptrdiff_t B = sizes[0], C = sizes[1], H = sizes[2], W = sizes[3], h = sizes[4], w = sizes[5], kh = sizes[6],
                    kw = sizes[7], sy = sizes[8], sx = sizes[9], py = sizes[10], px = sizes[11];
    /* Length of a row from the first window's left edge to the last one's right edge. */
    const ptrdiff_t padded_row = larger(W + px, (w - 1) * sx + kw) * C;
    int allocated = 1;
#pragma omp parallel reduction(&& : allocated)
    {
        float *row = malloc((size_t)padded_row * sizeof *row);
        allocated = row != NULL;
#pragma omp for schedule(static)
        for (ptrdiff_t i = 0; i < B * H; i++) {
            if (!row) continue;
            memset(row, 0, (size_t)padded_row * sizeof *row);
            for (ptrdiff_t ky = 0; ky < kh; ky++) {
                const ptrdiff_t dy = i % H + py - ky;
                if (dy < 0 || dy % sy || dy / sy >= h) continue;
                for (ptrdiff_t x = 0; x < w; x++) {
                    const ptrdiff_t source = ((((i / H) * h + dy / sy) * w + x) * kh + ky) * kw * C;
                    float *target = row + x * sx * C;
                    if (half)
                        for (ptrdiff_t j = 0; j < kw * C; j++) {
                            const uint32_t wide_bits = (uint32_t)((const uint16_t *)windows)[source + j] << 16;
                            float value;
                            memcpy(&value, &wide_bits, sizeof value);
                            target[j] += value;
                        }
                    else
                        for (ptrdiff_t j = 0; j < kw * C; j++) target[j] += ((const float *)windows)[source + j];
                }
            }
            for (ptrdiff_t j = 0; j < W * C; j++) {
                if (half) {
                    uint32_t bits;
                    memcpy(&bits, row + px * C + j, sizeof bits);
                    ((uint16_t *)output)[i * W * C + j] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                } else {
                    ((float *)output)[i * W * C + j] = row[px * C + j];
                }
            }
        }
        free(row);
    }
    return allocated;
}
