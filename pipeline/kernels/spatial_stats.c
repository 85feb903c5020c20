/* One reading of a layer's maps: reduction.py says what for. No sum is split among threads or lanes, and nothing is
   contracted (-ffp-contract=off), so that every machine and every number of threads gives the same bits. */
#include <math.h>
#include <stddef.h>

enum { WIDE = 256, TOGETHER = 256 };

/* Maps (B, P, C) and centres (C,) to (5, B, C): largest, smallest, mean d, mean d*d, share above 0. A row of channels
   is read as it lies in memory, and its running numbers stay in the processor's nearest. */
void reduce(const float *restrict maps, const float *restrict centres, float *restrict found, ptrdiff_t B, ptrdiff_t P,
            ptrdiff_t C) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t from = 0; from < C; from += WIDE) {
            const ptrdiff_t n = C - from < WIDE ? C - from : WIDE;
            const float *centre = centres + from;
            float peak[WIDE], low[WIDE], first[WIDE], second[WIDE], above[WIDE];
            double shift[WIDE], square[WIDE], positive[WIDE];
            for (ptrdiff_t i = 0; i < n; i++) {
                peak[i] = -INFINITY, low[i] = INFINITY;
                shift[i] = square[i] = positive[i] = 0;
            }
            for (ptrdiff_t start = 0; start < P; start += TOGETHER) {
                const ptrdiff_t end = P - start < TOGETHER ? P : start + TOGETHER;
                for (ptrdiff_t i = 0; i < n; i++) first[i] = second[i] = above[i] = 0;
                for (ptrdiff_t p = start; p < end; p++) {
                    const float *row = maps + (b * P + p) * C + from;
                    for (ptrdiff_t i = 0; i < n; i++) {
                        const float x = row[i], d = x - centre[i];
                        peak[i] = x > peak[i] ? x : peak[i];
                        low[i] = x < low[i] ? x : low[i];
                        first[i] += d;
                        second[i] += d * d;
                        above[i] += x > 0 ? 1.0f : 0.0f;
                    }
                }
                for (ptrdiff_t i = 0; i < n; i++) shift[i] += first[i], square[i] += second[i], positive[i] += above[i];
            }
            float *out = found + b * C + from;
            for (ptrdiff_t i = 0; i < n; i++) {
                /* Comparisons pass over what is no number; sums do not. */
                const int number = shift[i] == shift[i];
                out[i] = number ? peak[i] : NAN;
                out[B * C + i] = number ? low[i] : NAN;
                out[2 * B * C + i] = (float)(shift[i] / P);
                out[3 * B * C + i] = (float)(square[i] / P);
                out[4 * B * C + i] = (float)(positive[i] / P);
            }
        }
}
