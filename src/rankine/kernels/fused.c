/* One row through a weight (o, i), or through two factors (r, i) and (o, r), in one call.
 *
 * Decoding reads every weight once for one row: what counts is to stream memory without a pause and
 * to start quickly. So rows of the weight are read one after the other, a single stream that the
 * processor can foresee, into four vector sums. Two bfloat16 weights are widened as one 32-bit word,
 * which leaves the even ones in one vector and the odd ones in another: x is kept in that order.
 * Sums and the row between the factors are float32, whatever the weights are. Little-endian.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef float lanes __attribute__((vector_size(64)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(64)));
enum { LANES = 16, PAIRS = 2 * LANES };

/* Below this many weights a second thread costs more than it brings. */
enum { ALONE = 1 << 18 };

static inline lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float total(lanes v) { /* by halves: a chain of 16 sums would cost more than a row */
    eight e[2];
    memcpy(e, &v, sizeof e);
    e[0] += e[1];
    four f[2];
    memcpy(f, &e[0], sizeof f);
    f[0] += f[1];
    return (f[0][0] + f[0][1]) + (f[0][2] + f[0][3]);
}

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

/* ---- one row of a weight with x ------------------------------------------------------------- */
static inline void pairs(const bf16 *w, const float *x, lanes *even, lanes *odd) {
    words both;
    memcpy(&both, w, sizeof both);
    *even += (lanes)(both << 16) * load(x);
    *odd += (lanes)(both & 0xffff0000u) * load(x + LANES);
}

static inline float dot_bfloat16(const bf16 *w, const float *x, long i) {
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    long k = 0;
    for (; k + 2 * PAIRS <= i; k += 2 * PAIRS) {
        pairs(w + k, x + k, &a, &b);
        pairs(w + k + PAIRS, x + k + PAIRS, &c, &d);
    }
    for (; k + PAIRS <= i; k += PAIRS) pairs(w + k, x + k, &a, &b);
    float s = total((a + b) + (c + d));
    for (; k < i; k++) s += from_bf16(w[k]) * x[k];
    return s;
}

static inline float dot_float32(const float *w, const float *x, long i) {
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    long k = 0;
    for (; k + 4 * LANES <= i; k += 4 * LANES) {
        a += load(w + k) * load(x + k);
        b += load(w + k + LANES) * load(x + k + LANES);
        c += load(w + k + 2 * LANES) * load(x + k + 2 * LANES);
        d += load(w + k + 3 * LANES) * load(x + k + 3 * LANES);
    }
    for (; k + LANES <= i; k += LANES) a += load(w + k) * load(x + k);
    float s = total((a + b) + (c + d));
    for (; k < i; k++) s += w[k] * x[k];
    return s;
}

/* The order in which the dot products above want x: evens before odds in every 32 values. */
static void order_bfloat16(float *x, long i) {
    float block[PAIRS];
    for (long k = 0; k + PAIRS <= i; k += PAIRS) {
        memcpy(block, x + k, sizeof block);
        for (int j = 0; j < LANES; j++) {
            x[k + j] = block[2 * j];
            x[k + LANES + j] = block[2 * j + 1];
        }
    }
}

static void order_float32(float *x, long i) { (void)x, (void)i; }

static inline float from_float32(float f) { return f; }
static inline float to_float32(float f) { return f; }

/* ---- the products --------------------------------------------------------------------------- */
#define DEFINE(T, NAME, FROM, TO)                                                                 \
    static void rows_##NAME(const T *w, const float *x, float *y, long o, long i, int threads) {  \
        int shared = threads > 1 && o * i > ALONE;                                                \
        (void)shared;                                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (shared)")             \
        for (long r = 0; r < o; r++) y[r] = dot_##NAME(w + r * i, x, i);                          \
    }                                                                                             \
                                                                                                  \
    /* down is unused for r = 0: one weight. Returns 0, or 1 without memory. */                   \
    int product_##NAME(const T *down, const T *up, const T *x, T *y, long o, long r, long i,      \
                       int threads) {                                                             \
        float *row = malloc(sizeof(float) * (size_t)(i + r + o));                                 \
        if (!row) return 1;                                                                       \
        float *middle = row + i, *out = middle + r;                                               \
        for (long k = 0; k < i; k++) row[k] = FROM(x[k]);                                         \
        order_##NAME(row, i);                                                                     \
        if (r) {                                                                                  \
            rows_##NAME(down, row, middle, r, i, threads);                                        \
            order_##NAME(middle, r);                                                              \
        }                                                                                         \
        rows_##NAME(up, r ? middle : row, out, o, r ? r : i, threads);                            \
        for (long k = 0; k < o; k++) y[k] = TO(out[k]);                                           \
        free(row);                                                                                \
        return 0;                                                                                 \
    }

DEFINE(bf16, bfloat16, from_bf16, to_bf16)
DEFINE(float, float32, from_float32, to_float32)
