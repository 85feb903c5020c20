/* Adam in two passes over memory instead of seven. The reference is `Adam.step` in visualization/optimizers.py. */
#include <math.h>
#include <stddef.h>

enum { LANES = 16, CHUNK = 4096 };

struct coefficients {
    float beta1, beta2, momentum_weight, gradient_weight, damping, epsilon, rate;
};

/* One step for one image: n second moments, each shared by `group` adjacent parameters. `group` is a compile-time
   constant (1 or 2). p: parameters, g: gradient, m: first moments, v: second moments. */
__attribute__((always_inline)) static inline void step(float *restrict p, const float *restrict g, float *restrict m,
                                                       float *restrict v, ptrdiff_t n, const int group,
                                                       const struct coefficients c) {
    /* Sum in a fixed number of lanes: bit-identical results whatever vector width the compiler chooses. */
    double total = 0;
    for (ptrdiff_t start = 0; start < n; start += CHUNK) {
        const ptrdiff_t end = n - start < CHUNK ? n : start + CHUNK;
        for (ptrdiff_t i = start * group; i < end * group; i++) m[i] = m[i] + (1 - c.beta1) * (g[i] - m[i]);
        for (ptrdiff_t i = start; i < end; i++) {
            float square = g[i * group] * g[i * group];
            if (group == 2) square = 0.5f * (square + g[2 * i + 1] * g[2 * i + 1]);
            v[i] = c.beta2 * v[i] + (1 - c.beta2) * square;
        }
        float lanes[LANES] = {0};
        ptrdiff_t i = start;
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += v[i + j];
        for (; i < end; i++) total += v[i];
        for (int j = 0; j < LANES; j++) total += lanes[j];
    }
    const float offset = c.damping * (float)sqrt(total / (double)n) + c.epsilon;
    for (ptrdiff_t i = 0; i < n; i++) {
        const float denominator = sqrtf(v[i]) + offset;
        for (int j = 0; j < group; j++) {
            const ptrdiff_t at = i * group + j;
            p[at] += c.rate * (c.momentum_weight * m[at] + c.gradient_weight * g[at]) / denominator;
        }
    }
}

/* One Adam step up the gradient for B images, in place.

   Each image has n second moments; each of them belongs to `group` (1 or 2) adjacent parameters. The direction is
   momentum_weight * first moment + gradient_weight * gradient. The denominator is sqrt(second moment) + offset, where
   offset = damping * sqrt(mean second moment of the image) + epsilon. */
void adam(float *restrict parameters, const float *restrict gradients, float *restrict first_moments,
          float *restrict second_moments, ptrdiff_t B, ptrdiff_t n, ptrdiff_t group, float beta1, float beta2,
          float momentum_weight, float gradient_weight, float damping, float epsilon, float rate) {
    const struct coefficients c = {beta1, beta2, momentum_weight, gradient_weight, damping, epsilon, rate};
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++) {
        const ptrdiff_t at = b * n * group;
        if (group == 2)
            step(parameters + at, gradients + at, first_moments + at, second_moments + b * n, n, 2, c);
        else
            step(parameters + at, gradients + at, first_moments + at, second_moments + b * n, n, 1, c);
    }
}
