/* Adam in two readings of its numbers instead of seven: optimizers.py says what it computes. */
#include <math.h>
#include <stddef.h>

enum { LANES = 16, CHUNK = 4096 };

struct rates {
    float beta1, beta2, ahead, now, damping, least, rate;
};

/* One picture of n second moments, each of `together` parameters that lie beside each other, which is known when this
   is compiled. */
__attribute__((always_inline)) static inline void step(float *restrict p, const float *restrict g, float *restrict m,
                                                       float *restrict v, ptrdiff_t n, const int together,
                                                       const struct rates r) {
    /* Sums of a fixed number of lanes: the same bits whatever the compiler makes of them. */
    double total = 0;
    for (ptrdiff_t from = 0; from < n; from += CHUNK) {
        const ptrdiff_t end = n - from < CHUNK ? n : from + CHUNK;
        for (ptrdiff_t i = from * together; i < end * together; i++) m[i] = m[i] + (1 - r.beta1) * (g[i] - m[i]);
        for (ptrdiff_t i = from; i < end; i++) {
            float square = g[i * together] * g[i * together];
            if (together == 2) square = 0.5f * (square + g[2 * i + 1] * g[2 * i + 1]);
            v[i] = r.beta2 * v[i] + (1 - r.beta2) * square;
        }
        float lanes[LANES] = {0};
        ptrdiff_t i = from;
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += v[i + j];
        for (; i < end; i++) total += v[i];
        for (int j = 0; j < LANES; j++) total += lanes[j];
    }
    const float held = r.damping * (float)sqrt(total / (double)n) + r.least;
    for (ptrdiff_t i = 0; i < n; i++) {
        const float size = sqrtf(v[i]) + held;
        for (int j = 0; j < together; j++) {
            const ptrdiff_t at = i * together + j;
            p[at] += r.rate * (r.ahead * m[at] + r.now * g[at]) / size;
        }
    }
}

/* B pictures of n second moments each, for 1 or 2 parameters. The direction is `ahead` of the first moment and `now` of
   the gradient; the root mean square of a picture's second moment times `damping`, and `least`, keep the denominator
   from zero. */
void adam(float *restrict parameters, const float *restrict gradients, float *restrict firsts, float *restrict seconds,
          ptrdiff_t B, ptrdiff_t n, ptrdiff_t together, float beta1, float beta2, float ahead, float now, float damping,
          float least, float rate) {
    const struct rates r = {beta1, beta2, ahead, now, damping, least, rate};
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++) {
        const ptrdiff_t at = b * n * together;
        if (together == 2)
            step(parameters + at, gradients + at, firsts + at, seconds + b * n, n, 2, r);
        else
            step(parameters + at, gradients + at, firsts + at, seconds + b * n, n, 1, r);
    }
}
