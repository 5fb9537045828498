/* One row through a weight (o, i), or through two factors (r, i) and (o, r), in one call.
 *
 * Decoding reads every weight once for one row: what counts is to stream memory without a pause and
 * to start quickly. Four rows of the weight at a time give the processor four independent sums.
 * Sums and the row between the factors are float32, whatever the weights are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 to_bf16(float f) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define SAME(v) (v)

/* Below this many weights a second thread costs more than it brings. */
#define ALONE 262144

#define DEFINE(T, LOAD, STORE, NAME)                                                              \
    static void rows_##NAME(const T *w, const float *x, float *y, long o, long i, int threads) {  \
        long quads = o / 4;                                                                       \
        (void)threads;                                                                            \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1 && o * i > ALONE)") \
        for (long q = 0; q < quads; q++) {                                                        \
            const T *a = w + 4 * q * i, *b = a + i, *c = b + i, *d = c + i;                       \
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                 \
            _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")                                     \
            for (long k = 0; k < i; k++) {                                                        \
                s0 += LOAD(a[k]) * x[k];                                                          \
                s1 += LOAD(b[k]) * x[k];                                                          \
                s2 += LOAD(c[k]) * x[k];                                                          \
                s3 += LOAD(d[k]) * x[k];                                                          \
            }                                                                                     \
            y[4 * q] = s0, y[4 * q + 1] = s1, y[4 * q + 2] = s2, y[4 * q + 3] = s3;               \
        }                                                                                         \
        for (long r = 4 * quads; r < o; r++) {                                                    \
            float s = 0;                                                                          \
            _Pragma("omp simd reduction(+ : s)")                                                  \
            for (long k = 0; k < i; k++) s += LOAD(w[r * i + k]) * x[k];                          \
            y[r] = s;                                                                             \
        }                                                                                         \
    }                                                                                             \
                                                                                                  \
    /* r = 0: one weight, `up`. Returns 0, or 1 without memory. */                                \
    int product_##NAME(const T *down, const T *up, const T *x, T *y, long o, long r, long i,      \
                       int threads) {                                                             \
        float *row = malloc(sizeof(float) * (size_t)(i + r + o));                                 \
        if (!row) return 1;                                                                       \
        float *middle = row + i, *out = middle + r;                                               \
        for (long k = 0; k < i; k++) row[k] = LOAD(x[k]);                                         \
        if (r) rows_##NAME(down, row, middle, r, i, threads);                                     \
        rows_##NAME(up, r ? middle : row, out, o, r ? r : i, threads);                            \
        for (long k = 0; k < o; k++) y[k] = STORE(out[k]);                                        \
        free(row);                                                                                \
        return 0;                                                                                 \
    }

DEFINE(bf16, from_bf16, to_bf16, bfloat16)
DEFINE(float, SAME, SAME, float32)
