/* Bilinear affine resampling of images and its gradient; see affine_sample.py. */
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WIDTH = 2048 };

/* Up to four channels of a pixel are adjacent in memory, so that one vector instruction processes all of them. */
typedef float pixel __attribute__((vector_size(16)));

/* Reflect a coordinate (in pixels) at the outer edges of the first and last pixel, then clamp it to their centers. */
static inline float reflect(float x, float size) {
    const float source = x + 0.5f, distance = fabsf(source);
    const float reflections = floorf(distance / size), remainder = distance - reflections * size;
    const float odd = reflections - 2.0f * floorf(reflections * 0.5f);
    const float value = (odd > 0.5f ? size - remainder : remainder) - 0.5f;
    /* Not fmaxf and fminf: they may be function calls, which prevent vectorization. NaN becomes 0. */
    const float clamped = value > 0.0f ? value : 0.0f;
    return clamped < size - 1.0f ? clamped : size - 1.0f;
}

/* For each pixel of an output row: the offsets of its four input neighbors (two above, two below) and their weights. */
static inline void locate_row(const float *matrix, ptrdiff_t y, ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w,
                              int offset[4][MAX_WIDTH], float weight[4][MAX_WIDTH]) {
    const float dy = (float)y + 0.5f - (float)h / 2;
    const float x0 = matrix[1] * dy + matrix[2] + (float)W / 2 - 0.5f;
    const float y0 = matrix[4] * dy + matrix[5] + (float)H / 2 - 0.5f;
    const float ax = matrix[0], ay = matrix[3], half = (float)w / 2;
    for (int x = 0; x < (int)w; x++) {
        const float dx = (float)x + 0.5f - half;
        const float fx = reflect(ax * dx + x0, (float)W), fy = reflect(ay * dx + y0, (float)H);
        const int left = (int)fx, top = (int)fy;
        const int right = left + (left < (int)W - 1), below = top + (top < (int)H - 1);
        const float u = fx - (float)left, v = fy - (float)top;
        offset[0][x] = top * (int)W + left, offset[1][x] = top * (int)W + right;
        offset[2][x] = below * (int)W + left, offset[3][x] = below * (int)W + right;
        weight[0][x] = (1 - u) * (1 - v), weight[1][x] = u * (1 - v);
        weight[2][x] = (1 - u) * v, weight[3][x] = u * v;
    }
}

/* Sample one image (C, H, W) into a view (h, w, C). `pixels` is a buffer of H * W; C is a compile-time constant. */
__attribute__((always_inline)) static inline void sample_image(const float *image, const float *matrix, float *view,
                                                               pixel *pixels, const int C, ptrdiff_t H, ptrdiff_t W,
                                                               ptrdiff_t h, ptrdiff_t w) {
    int offset[4][MAX_WIDTH];
    float weight[4][MAX_WIDTH];
    for (ptrdiff_t i = 0; i < H * W; i++)
        for (int c = 0; c < 4; c++) pixels[i][c] = image[(c < C ? c : 0) * H * W + i];
    for (ptrdiff_t y = 0; y < h; y++) {
        locate_row(matrix, y, H, W, h, w, offset, weight);
        float *target = view + y * w * C;
        for (int x = 0; x < (int)w; x++) {
            const pixel value = weight[0][x] * pixels[offset[0][x]] + weight[1][x] * pixels[offset[1][x]] +
                                weight[2][x] * pixels[offset[2][x]] + weight[3][x] * pixels[offset[3][x]];
            memcpy(target + x * C, &value, (size_t)C * sizeof(float));
        }
    }
}

/* Propagate the gradient of a view (h, w, C) to its image (C, H, W). `pixels` is a buffer of H * W. */
__attribute__((always_inline)) static inline void sample_gradient(const float *view, const float *matrix, float *image,
                                                                  pixel *pixels, const int C, ptrdiff_t H, ptrdiff_t W,
                                                                  ptrdiff_t h, ptrdiff_t w) {
    int offset[4][MAX_WIDTH];
    float weight[4][MAX_WIDTH];
    memset(pixels, 0, (size_t)(H * W) * sizeof(pixel));
    for (ptrdiff_t y = 0; y < h; y++) {
        locate_row(matrix, y, H, W, h, w, offset, weight);
        const float *source = view + y * w * C;
        for (int x = 0; x < (int)w; x++) {
            pixel g = {0, 0, 0, 0};
            memcpy(&g, source + x * C, (size_t)C * sizeof(float));
            for (int i = 0; i < 4; i++) pixels[offset[i][x]] += g * weight[i][x];
        }
    }
    for (int c = 0; c < C; c++)
        for (ptrdiff_t i = 0; i < H * W; i++) image[c * H * W + i] = pixels[i][c];
}

/* Call `function` with the number of channels as a compile-time constant. */
#define FOR_CHANNELS(function, source, matrix, target, pixels)                                                         \
    switch (C) {                                                                                                       \
    case 1: function(source, matrix, target, pixels, 1, H, W, h, w); break;                                            \
    case 2: function(source, matrix, target, pixels, 2, H, W, h, w); break;                                            \
    case 3: function(source, matrix, target, pixels, 3, H, W, h, w); break;                                            \
    default: function(source, matrix, target, pixels, 4, H, W, h, w);                                                  \
    }

/* Sample images (B, C, H, W), C <= 4, through matrices (B, 2, 3) into views (B, h, w, C). With `backward`, propagate
   gradients of views (B, h, w, C) to images (B, C, H, W) instead. Return 0 if memory cannot be allocated. */
int sample(const float *restrict source, const float *restrict matrices, float *restrict target, int backward,
           ptrdiff_t B, ptrdiff_t C, ptrdiff_t H, ptrdiff_t W, ptrdiff_t h, ptrdiff_t w) {
    const ptrdiff_t image = C * H * W, view = h * w * C;
    int allocated = 1;
#pragma omp parallel for schedule(static) reduction(&& : allocated)
    for (ptrdiff_t b = 0; b < B; b++) {
        pixel *pixels = malloc((size_t)(H * W) * sizeof(pixel));
        allocated = allocated && pixels;
        if (!pixels) continue;
        if (backward)
            FOR_CHANNELS(sample_gradient, source + b * view, matrices + 6 * b, target + b * image, pixels)
        else
            FOR_CHANNELS(sample_image, source + b * image, matrices + 6 * b, target + b * view, pixels)
        free(pixels);
    }
    return allocated;
}
