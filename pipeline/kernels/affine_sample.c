/* Pictures seen through a matrix, bilinearly, and back: sampling.py says what for. */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { WIDE = 2048 };

/* Up to four channels of a pixel lie together, so that one instruction does all of them. */
typedef float pixel __attribute__((vector_size(16)));

/* A coordinate in pixels, reflected at the outer edges of the first and last pixel, then held at their centres. */
static inline float within(float x, float size) {
    const float from = x + 0.5f, away = fabsf(from);
    const float times = floorf(away / size), rest = away - times * size;
    const float odd = times - 2.0f * floorf(times * 0.5f);
    const float found = (odd > 0.5f ? size - rest : rest) - 0.5f;
    /* Not fmaxf and fminf: they may be calls, and a loop with a call is not made wide. What is no number becomes 0. */
    const float held = found > 0.0f ? found : 0.0f;
    return held < size - 1.0f ? held : size - 1.0f;
}

/* Where a row of the view lies on the picture: the offsets of two pixels above and two below, and their weights. */
static inline void row_of(const float *matrix, ptrdiff_t y, ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w,
                          int at[4][WIDE], float weight[4][WIDE]) {
    const float down = (float)y + 0.5f - (float)h / 2;
    const float x0 = matrix[1] * down + matrix[2] + (float)W / 2 - 0.5f;
    const float y0 = matrix[4] * down + matrix[5] + (float)H / 2 - 0.5f;
    const float ax = matrix[0], ay = matrix[3], half = (float)w / 2;
    for (int x = 0; x < (int)w; x++) {
        const float across = (float)x + 0.5f - half;
        const float fx = within(ax * across + x0, (float)W), fy = within(ay * across + y0, (float)H);
        const int left = (int)fx, top = (int)fy;
        const int right = left + (left < (int)W - 1), below = top + (top < (int)H - 1);
        const float u = fx - (float)left, v = fy - (float)top;
        at[0][x] = top * (int)W + left, at[1][x] = top * (int)W + right;
        at[2][x] = below * (int)W + left, at[3][x] = below * (int)W + right;
        weight[0][x] = (1 - u) * (1 - v), weight[1][x] = u * (1 - v);
        weight[2][x] = (1 - u) * v, weight[3][x] = u * v;
    }
}

/* One image (C, H, W) to a view (h, w, C) by way of `picture`, H * W pixels; C is known when this is compiled. */
__attribute__((always_inline)) static inline void look_at(const float *image, const float *matrix, float *view,
                                                          pixel *picture, const int C, ptrdiff_t H, ptrdiff_t W,
                                                          ptrdiff_t h, ptrdiff_t w) {
    int at[4][WIDE];
    float weight[4][WIDE];
    for (ptrdiff_t i = 0; i < H * W; i++)
        for (int c = 0; c < 4; c++) picture[i][c] = image[(c < C ? c : 0) * H * W + i];
    for (ptrdiff_t y = 0; y < h; y++) {
        row_of(matrix, y, H, W, h, w, at, weight);
        float *to = view + y * w * C;
        for (int x = 0; x < (int)w; x++) {
            const pixel found = weight[0][x] * picture[at[0][x]] + weight[1][x] * picture[at[1][x]] +
                                weight[2][x] * picture[at[2][x]] + weight[3][x] * picture[at[3][x]];
            memcpy(to + x * C, &found, (size_t)C * sizeof(float));
        }
    }
}

/* The gradient of a view (h, w, C) to that of its image (C, H, W) by way of `picture`. */
__attribute__((always_inline)) static inline void back_from(const float *view, const float *matrix, float *image,
                                                            pixel *picture, const int C, ptrdiff_t H, ptrdiff_t W,
                                                            ptrdiff_t h, ptrdiff_t w) {
    int at[4][WIDE];
    float weight[4][WIDE];
    memset(picture, 0, (size_t)(H * W) * sizeof(pixel));
    for (ptrdiff_t y = 0; y < h; y++) {
        row_of(matrix, y, H, W, h, w, at, weight);
        const float *from = view + y * w * C;
        for (int x = 0; x < (int)w; x++) {
            pixel g = {0, 0, 0, 0};
            memcpy(&g, from + x * C, (size_t)C * sizeof(float));
            for (int i = 0; i < 4; i++) picture[at[i][x]] += g * weight[i][x];
        }
    }
    for (int c = 0; c < C; c++)
        for (ptrdiff_t i = 0; i < H * W; i++) image[c * H * W + i] = picture[i][c];
}

/* Calls `one` with the number of channels as a constant. */
#define FOR_CHANNELS(one, from, matrix, to, picture)                                                                   \
    switch (C) {                                                                                                       \
    case 1: one(from, matrix, to, picture, 1, H, W, h, w); break;                                                      \
    case 2: one(from, matrix, to, picture, 2, H, W, h, w); break;                                                      \
    case 3: one(from, matrix, to, picture, 3, H, W, h, w); break;                                                      \
    default: one(from, matrix, to, picture, 4, H, W, h, w);                                                            \
    }

/* Images (B, C, H, W) of at most four channels through matrices (B, 2, 3) to a view (B, h, w, C); or, `backwards`, the
   gradient of such a view to that of its images. 0 without memory. */
int sample(const float *restrict from, const float *restrict matrices, float *restrict to, int backwards, ptrdiff_t B,
           ptrdiff_t C, ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w) {
    const ptrdiff_t image = C * H * W, view = h * w * C;
    int done = 1;
#pragma omp parallel for schedule(static) reduction(&& : done)
    for (ptrdiff_t b = 0; b < B; b++) {
        pixel *picture = malloc((size_t)(H * W) * sizeof(pixel));
        done = done && picture;
        if (!picture) continue;
        if (backwards)
            FOR_CHANNELS(back_from, from + b * view, matrices + 6 * b, to + b * image, picture)
        else
            FOR_CHANNELS(look_at, from + b * image, matrices + 6 * b, to + b * view, picture)
        free(picture);
    }
    return done;
}
