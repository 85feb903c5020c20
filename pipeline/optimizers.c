/* Adam in two readings of its numbers instead of seven: optimizers.py says what it computes. */
#include <math.h>
#include <stddef.h>

enum { LANES = 16 };

/* B pictures of n parameters each. The direction is `ahead` of the first moment and `now` of the gradient; the
   root mean square of a picture's second moment times `damping`, and `least`, keep the denominator from zero. */
void adam(float *restrict parameters, const float *restrict gradients, float *restrict firsts, float *restrict seconds,
          ptrdiff_t B, ptrdiff_t n, float beta1, float beta2, float ahead, float now, float damping, float least,
          float rate) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++) {
        const float *g = gradients + b * n;
        float *p = parameters + b * n, *m = firsts + b * n, *v = seconds + b * n;
        /* Sums of a fixed number of lanes: the same bits whatever the compiler makes of them. */
        double total = 0;
        for (ptrdiff_t from = 0; from < n; from += 4096) {
            const ptrdiff_t end = n - from < 4096 ? n : from + 4096;
            float lanes[LANES] = {0};
            ptrdiff_t i = from;
            for (; i + LANES <= end; i += LANES)
                for (int j = 0; j < LANES; j++) {
                    m[i + j] = m[i + j] + (1 - beta1) * (g[i + j] - m[i + j]);
                    v[i + j] = beta2 * v[i + j] + (1 - beta2) * (g[i + j] * g[i + j]);
                    lanes[j] += v[i + j];
                }
            for (; i < end; i++) {
                m[i] = m[i] + (1 - beta1) * (g[i] - m[i]);
                v[i] = beta2 * v[i] + (1 - beta2) * (g[i] * g[i]);
                total += v[i];
            }
            for (int j = 0; j < LANES; j++) total += lanes[j];
        }
        const float held = damping * (float)sqrt(total / (double)n) + least;
        for (ptrdiff_t i = 0; i < n; i++) p[i] += rate * (ahead * m[i] + now * g[i]) / (sqrtf(v[i]) + held);
    }
}
