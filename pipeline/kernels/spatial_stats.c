/* Spatial statistics of activation maps in one pass over memory; see spatial_stats.py. No sum is split among threads or
   lanes, and products and sums are not fused (-ffp-contract=off): results are bit-identical on every machine and with
   any number of threads. */
#include <math.h>
#include <stddef.h>

enum { BLOCK = 256, CHUNK = 256 };

/* Reduce maps (B, P, C) to (5, B, C): maximum, minimum, mean d, mean d*d and share above 0, where d = map - center and
   centers are (C,). Channels are processed in blocks whose accumulators stay in the L1 cache. */
void reduce(const float *restrict maps, const float *restrict centers, float *restrict output, ptrdiff_t B, ptrdiff_t P,
            ptrdiff_t C) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t channel = 0; channel < C; channel += BLOCK) {
            const ptrdiff_t n = C - channel < BLOCK ? C - channel : BLOCK;
            const float *center = centers + channel;
            float maximum[BLOCK], minimum[BLOCK], deviation[BLOCK], square[BLOCK], positive[BLOCK];
            double total_deviation[BLOCK], total_square[BLOCK], total_positive[BLOCK];
            for (ptrdiff_t i = 0; i < n; i++) {
                maximum[i] = -INFINITY, minimum[i] = INFINITY;
                total_deviation[i] = total_square[i] = total_positive[i] = 0;
            }
            for (ptrdiff_t start = 0; start < P; start += CHUNK) {
                const ptrdiff_t end = P - start < CHUNK ? P : start + CHUNK;
                for (ptrdiff_t i = 0; i < n; i++) deviation[i] = square[i] = positive[i] = 0;
                for (ptrdiff_t p = start; p < end; p++) {
                    const float *row = maps + (b * P + p) * C + channel;
                    for (ptrdiff_t i = 0; i < n; i++) {
                        const float x = row[i], d = x - center[i];
                        maximum[i] = x > maximum[i] ? x : maximum[i];
                        minimum[i] = x < minimum[i] ? x : minimum[i];
                        deviation[i] += d;
                        square[i] += d * d;
                        positive[i] += x > 0 ? 1.0f : 0.0f;
                    }
                }
                for (ptrdiff_t i = 0; i < n; i++) {
                    total_deviation[i] += deviation[i];
                    total_square[i] += square[i];
                    total_positive[i] += positive[i];
                }
            }
            float *out = output + b * C + channel;
            for (ptrdiff_t i = 0; i < n; i++) {
                /* Comparisons ignore NaN, sums do not: a NaN sum marks maps that contain one. */
                const int is_number = total_deviation[i] == total_deviation[i];
                out[i] = is_number ? maximum[i] : NAN;
                out[B * C + i] = is_number ? minimum[i] : NAN;
                out[2 * B * C + i] = (float)(total_deviation[i] / P);
                out[3 * B * C + i] = (float)(total_square[i] / P);
                out[4 * B * C + i] = (float)(total_positive[i] / P);
            }
        }
}
