/* Pictures seen through a matrix, bilinearly, and back: sampling.py says what for. */
#include <math.h>
#include <stddef.h>
#include <string.h>

enum { WIDE = 2048 };

/* A coordinate in pixels, reflected at the outer edges of the first and last pixel, then held at their centres. */
static inline float within(float x, float size) {
    const float from = x + 0.5f, away = fabsf(from);
    const float times = floorf(away / size), rest = away - times * size;
    const float odd = times - 2.0f * floorf(times * 0.5f);
    const float found = (odd > 0.5f ? size - rest : rest) - 0.5f;
    return fminf(fmaxf(found, 0.0f), size - 1.0f);
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

/* Images (B, C, H, W) through matrices (B, 2, 3) to a view (B, h, w, C). */
void look(const float *restrict images, const float *restrict matrices, float *restrict view, ptrdiff_t B, ptrdiff_t C,
          ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w) {
#pragma omp parallel for collapse(2) schedule(static)
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t y = 0; y < h; y++) {
            int at[4][WIDE];
            float weight[4][WIDE], row[WIDE];
            row_of(matrices + 6 * b, y, H, W, h, w, at, weight);
            for (ptrdiff_t c = 0; c < C; c++) {
                const float *image = images + (b * C + c) * H * W;
                float *to = view + (b * h + y) * w * C + c;
                for (int x = 0; x < (int)w; x++)
                    row[x] = weight[0][x] * image[at[0][x]] + weight[1][x] * image[at[1][x]] +
                             weight[2][x] * image[at[2][x]] + weight[3][x] * image[at[3][x]];
                for (int x = 0; x < (int)w; x++) to[x * C] = row[x];
            }
        }
}

/* The gradient of a view (B, h, w, C) to that of the images (B, C, H, W), which is zero before. */
void back(const float *restrict view, const float *restrict matrices, float *restrict images, ptrdiff_t B, ptrdiff_t C,
          ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t y = 0; y < h; y++) {
            int at[4][WIDE];
            float weight[4][WIDE];
            row_of(matrices + 6 * b, y, H, W, h, w, at, weight);
            for (ptrdiff_t c = 0; c < C; c++) {
                const float *from = view + (b * h + y) * w * C + c;
                float *image = images + (b * C + c) * H * W;
                for (int x = 0; x < (int)w; x++) {
                    const float g = from[x * C];
                    image[at[0][x]] += g * weight[0][x];
                    image[at[1][x]] += g * weight[1][x];
                    image[at[2][x]] += g * weight[2][x];
                    image[at[3][x]] += g * weight[3][x];
                }
            }
        }
}
