/* What costs the most in a simulation on a CPU: training a device, and adding its update up.

   A device is a chain of linear layers and ReLUs and mini-batch SGD; see native.py. Its weights stay in the cache
   from the first step to the last. Three products do nearly all the work, each a loop over tiles whose sums stay in
   registers: outputs (forward), the gradient of the inputs (back), and the step of the weights along their gradient
   (descend). Where it can, the first layer does without weights of its own; see "the first layer" below. Updates are
   added as whole grid steps, by the arithmetic of lepton_fl.vector; see adding.py.

   GCC and Clang vector extensions, no intrinsics, no library but libm. Compiled twice: for float, and with -DDOUBLE
   for double. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
#define EXP exp
#define LOG log
#else
typedef float real;
#define EXP expf
#define LOG logf
#endif

/* Bytes of a vector, and the shape of a tile: its sums, and what they are made of, fill the registers. */
#if defined(__AVX512F__)
enum { BYTES = 64, ROWS = 5, OUTS = 4 };
#elif defined(__AVX__)
enum { BYTES = 32, ROWS = 3, OUTS = 3 };
#else
enum { BYTES = 16, ROWS = 5, OUTS = 4 };
#endif
enum { LANES = BYTES / sizeof(real), MANY = BYTES == 32 ? 2 : 4, PANEL = 16 * LANES, NEAR = 8192, ALIGN = 16, MOST = 16, MOST_ROWS = 512 };
typedef real vec __attribute__((vector_size(BYTES)));
typedef real half __attribute__((vector_size(BYTES / 2)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)))); /* anywhere */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define AT(p) (*(vec *)(p))
#ifdef __x86_64__ /* what is used again stays in a register: gcc would rather load it each time */
#define HOLD(v) __asm__("" : "+v"(v))
#else
#define HOLD(v) (void)0
#endif
#define EACH_COUNT(rows, call)                                                                                       \
    switch ((rows) < ROWS ? (rows) : ROWS) {                                                                         \
    case 1: { enum { N = 1 }; call; break; }                                                                         \
    case 2: { enum { N = 2 }; call; break; }                                                                         \
    case 3: { enum { N = 3 }; call; break; }                                                                         \
    case 4: { enum { N = ROWS > 4 ? 4 : ROWS }; call; break; }                                                       \
    default: { enum { N = ROWS }; call; }                                                                            \
    }

typedef struct { int64_t in, out, relu, weight, bias; } Layer; /* places in the model's vector; bias -1 = none */
typedef struct { double rate, decay, mu, momentum; } Rule;
typedef struct { real *w, *bias; } Place;      /* (out, padded in), (padded out) */
typedef struct { Place from, to, less; } Move; /* of a step of a layer's weights */

static int64_t padded(int64_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE real total(vec v) {
    half h[2];
    memcpy(h, &v, sizeof v);
    h[0] += h[1];
    real s[LANES / 2];
    memcpy(s, h, sizeof s);
    for (int n = LANES / 4; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

/* y (N, outs) = x (N, n) w (outs, n)^T + bias */
INLINE void forward_tile(int nb, int no, const real *x, const real *w, const real *bias, int64_t n, real *y, int64_t wide) {
    vec sum[ROWS][OUTS];
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int o = 0; o < no; o++) sum[b][o] = (vec){0};
    for (int64_t k = 0; k < n; k += LANES) {
        vec u[OUTS];
        UNROLL for (int o = 0; o < no; o++) { u[o] = AT(w + o * n + k); HOLD(u[o]); }
        UNROLL for (int b = 0; b < nb; b++) {
            vec v = AT(x + b * n + k);
            HOLD(v);
            UNROLL for (int o = 0; o < no; o++) sum[b][o] += v * u[o];
        }
    }
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int o = 0; o < no; o++) y[b * wide + o] = total(sum[b][o]) + bias[o];
}

INLINE void forward_rows(int nb, const real *x, const real *w, const real *bias, int64_t n, int64_t o, int64_t outs, real *y, int64_t wide) {
    for (; o + OUTS <= outs; o += OUTS) forward_tile(nb, OUTS, x, w + o * n, bias + o, n, y + o, wide);
    for (; o < outs; o++) forward_tile(nb, 1, x, w + o * n, bias + o, n, y + o, wide);
}

static void forward(const real *x, Place p, int64_t rows, int64_t n, int64_t outs, real *y, int64_t wide) {
    const int64_t some = (NEAR / n + 1) * OUTS; /* so much of w stays near */
    for (int64_t o = 0; o < outs; o += some)
        for (int64_t b = 0; b < rows; b += ROWS)
            EACH_COUNT(rows - b, forward_rows(N, x + b * n, p.w, p.bias, n, o, least(o + some, outs), y + b * wide, wide))
}

/* back (rows, n) = g (rows, outs) w (outs, n) */
INLINE void back_tile(int nb, int nk, const real *g, const real *w, int64_t outs, int64_t n, int64_t wide, real *back) {
    vec sum[ROWS][4];
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int k = 0; k < nk; k++) sum[b][k] = (vec){0};
    for (int64_t o = 0; o < outs; o++) {
        vec u[4];
        UNROLL for (int k = 0; k < nk; k++) { u[k] = AT(w + o * n + k * LANES); HOLD(u[k]); }
        UNROLL for (int b = 0; b < nb; b++) UNROLL for (int k = 0; k < nk; k++) sum[b][k] += g[b * wide + o] * u[k];
    }
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int k = 0; k < nk; k++) AT(back + b * n + k * LANES) = sum[b][k];
}

INLINE void back_rows(int nb, const real *g, const real *w, int64_t outs, int64_t n, int64_t k, int64_t to, int64_t wide, real *back) {
    for (; k + MANY * LANES <= to; k += MANY * LANES) back_tile(nb, MANY, g, w + k, outs, n, wide, back + k);
    for (; k < to; k += LANES) back_tile(nb, 1, g, w + k, outs, n, wide, back + k);
}

static void back(const real *g, Place p, int64_t rows, int64_t n, int64_t outs, int64_t wide, real *to) {
    for (int64_t k = 0; k < n; k += PANEL)
        for (int64_t b = 0; b < rows; b += ROWS)
            EACH_COUNT(rows - b, back_rows(N, g + b * wide, p.w, outs, n, k, least(k + PANEL, n), wide, to + b * n))
}

/* sum += g (rows, outs)^T x (rows, n), of a tile */
INLINE void outer_tile(int no, int nk, const real *x, const real *g, int64_t rows, int64_t n, int64_t wide, vec sum[4][4]) {
    for (int64_t b = 0; b < rows; b++) {
        vec v[4];
        UNROLL for (int k = 0; k < nk; k++) { v[k] = AT(x + b * n + k * LANES); HOLD(v[k]); }
        UNROLL for (int o = 0; o < no; o++) UNROLL for (int k = 0; k < nk; k++) sum[o][k] += g[b * wide + o] * v[k];
    }
}

/* to (outs, n) = keep from + g (rows, outs)^T x (rows, n), minus `less` if there is one */
INLINE void descend_tile(int no, int nk, const real *x, const real *g, int64_t rows, int64_t n, int64_t wide, real keep,
                         const Move *m, int64_t at) {
    vec sum[4][4];
    UNROLL for (int o = 0; o < no; o++) UNROLL for (int k = 0; k < nk; k++) sum[o][k] = keep * AT(m->from.w + at + o * n + k * LANES);
    outer_tile(no, nk, x, g, rows, n, wide, sum);
    if (m->less.w)
        UNROLL for (int o = 0; o < no; o++) UNROLL for (int k = 0; k < nk; k++) sum[o][k] -= AT(m->less.w + at + o * n + k * LANES);
    UNROLL for (int o = 0; o < no; o++) UNROLL for (int k = 0; k < nk; k++) AT(m->to.w + at + o * n + k * LANES) = sum[o][k];
}

INLINE void descend_by(const real *x, const real *g, int64_t rows, int64_t n, int64_t outs, int64_t wide, real keep, const Move *m) {
    for (int64_t from = 0; from < n; from += PANEL) { /* so much of x stays near */
        int64_t to = least(from + PANEL, n), o = 0, k;
        for (; o + 4 <= outs; o += 4) {
            for (k = from; k + MANY * LANES <= to; k += MANY * LANES)
                descend_tile(4, MANY, x + k, g + o, rows, n, wide, keep, m, o * n + k);
            for (; k < to; k += LANES) descend_tile(4, 1, x + k, g + o, rows, n, wide, keep, m, o * n + k);
        }
        for (; o < outs; o++)
            for (k = from; k < to; k += LANES) descend_tile(1, 1, x + k, g + o, rows, n, wide, keep, m, o * n + k);
    }
    for (int64_t o = 0; m->to.bias && o < outs; o++) {
        real sum = keep * m->from.bias[o];
        for (int64_t b = 0; b < rows; b++) sum += g[b * wide + o];
        m->to.bias[o] = m->less.bias ? sum - m->less.bias[o] : sum;
    }
}

static void descend(const real *x, const real *g, int64_t rows, int64_t n, int64_t outs, int64_t wide, real keep, const Move *m) {
    if (keep == 1)
        descend_by(x, g, rows, n, outs, wide, 1, m); /* without the multiplication */
    else
        descend_by(x, g, rows, n, outs, wide, keep, m);
}

/* The three products alone, for a linear layer among layers that are not trained here; see layers.Dense. Rows of x
   and back have n numbers, of y and g `outs`; n and outs are multiples of ALIGN. */
void lepton_forward(const real *x, real *w, real *bias, int64_t rows, int64_t n, int64_t outs, real *y) {
    forward(x, (Place){w, bias}, rows, n, outs, y, outs);
}

void lepton_back(const real *g, real *w, int64_t rows, int64_t n, int64_t outs, real *to) {
    back(g, (Place){w, 0}, rows, n, outs, outs, to);
}

void lepton_descend(const real *x, const real *g, int64_t rows, int64_t n, int64_t outs, double keep, real *w) {
    descend(x, g, rows, n, outs, outs, keep, &(Move){{w, 0}, {w, 0}, {0, 0}});
}

typedef struct { int32_t at; real by; } Term; /* `by` times the numbers from a place on */
typedef struct { int64_t images, places, outs, cells, wide, image, line, down, right, kernel, length; } Windows;

/* to (many vectors) += the sum of the terms */
INLINE void gather_tile(int many, const Term *t, const Term *end, const real *from, real *to) {
    loose sum[10];
    UNROLL for (int k = 0; k < many; k++) sum[k] = *(loose *)(to + k * LANES);
    for (; t < end; t++) UNROLL for (int k = 0; k < many; k++) sum[k] += t->by * *(loose *)(from + t->at + k * LANES);
    UNROLL for (int k = 0; k < many; k++) *(loose *)(to + k * LANES) = sum[k];
}

static void gather(const Term *t, const Term *end, const real *from, int64_t n, real *to) {
    for (; t < end && n >= 10 * LANES; n -= 10 * LANES, from += 10 * LANES, to += 10 * LANES) gather_tile(10, t, end, from, to);
    for (; t < end && n >= 4 * LANES; n -= 4 * LANES, from += 4 * LANES, to += 4 * LANES) gather_tile(4, t, end, from, to);
    for (; t < end && n; n -= LANES, from += LANES, to += LANES) gather_tile(1, t, end, from, to);
}

/* The way back through a convolution of whose outputs only maxima were kept: nearly all their gradients are zero.
   g are the others', and `at` is where those stand among the `cells` outputs of an image and a channel, `wide` in a
   row; both are (images, places, outs). A window is `kernel` lines of `length` numbers, a multiple of ALIGN. Windows
   begin `right` and `down` numbers after their neighbours, in x and dx (images, image); dx may be NULL.

   w, dw   (outs, kernel, length)
   terms   room for places * outs + 1; ends: for 2 cells + outs + 2 */
void lepton_unpool(const Windows *s, const real *x, const real *w, const real *g, const int64_t *at, Term *terms,
                   int32_t *ends, real *dw, real *db, real *dx) {
    const int64_t count = s->places * s->outs, size = s->kernel * s->length;
    int32_t *first = ends + s->cells + 1, *window = first + s->outs + 1;
    for (int64_t a = 0; a < s->cells; a++) window[a] = a / s->wide * s->down + a % s->wide * s->right;
    memset(dw, 0, s->outs * size * sizeof *dw);
    memset(db, 0, s->outs * sizeof *db);
    if (dx) memset(dx, 0, s->images * s->image * sizeof *dx);
    for (int64_t i = 0; i < s->images; i++, x += s->image, g += count, at += count) {
        Term *t = terms; /* by channel */
        for (int64_t o = 0; o < s->outs; o++) {
            real sum = 0;
            first[o] = t - terms;
            for (int64_t k = o; k < count; k += s->outs) {
                *t = (Term){window[at[k]], g[k]};
                t += g[k] != 0; /* true of NaN */
                sum += g[k];
            }
            db[o] += sum;
        }
        first[s->outs] = t - terms;
        for (int64_t r = 0; r < s->kernel; r++)
            for (int64_t o = 0; o < s->outs; o++)
                gather(terms + first[o], terms + first[o + 1], x + r * s->line, s->length, dw + o * size + r * s->length);
        if (!dx) continue;
        memset(ends, 0, (s->cells + 1) * sizeof *ends); /* by place */
        for (int64_t k = 0; k < count; k++) ends[at[k] + 1] += g[k] != 0;
        for (int64_t a = 0; a < s->cells; a++) ends[a + 1] += ends[a];
        for (int64_t k = 0; k < count; k += s->outs)
            for (int64_t o = 0; o < s->outs; o++) {
                int32_t *end = ends + at[k + o], none = s->places * s->outs;
                if (g[k + o] == 0) end = &none;
                terms[(*end)++] = (Term){o * size, g[k + o]};
            }
        for (int64_t r = 0; r < s->kernel; r++)
            for (int64_t a = 0; a < s->cells; a++)
                gather(terms + (a ? ends[a - 1] : 0), terms + ends[a], w + r * s->length, s->length,
                       dx + i * s->image + window[a] + r * s->line);
    }
}

/* The sum of the losses of a mini-batch, and the gradient of their mean. Kinds: see LOSSES in native.py. */
static double lose(int64_t kind, const real *z, const void *targets, const int64_t *at, int64_t rows, int64_t outs, int64_t wide, real *g) {
    double sum = 0;
    for (int64_t b = 0; b < rows; b++, z += wide, g += wide) {
        if (kind == 0) {
            int64_t label = ((const int64_t *)targets)[at[b]];
            real top = z[0], whole = 0;
            for (int64_t o = 1; o < outs; o++) top = z[o] > top ? z[o] : top;
            for (int64_t o = 0; o < outs; o++) whole += g[o] = EXP(z[o] - top);
            for (int64_t o = 0; o < outs; o++) g[o] = (g[o] / whole - (o == label)) / rows;
            sum += LOG(whole) + (top - z[label]);
            continue;
        }
        for (int64_t o = 0; o < outs; o++) {
            real d = z[o] - ((const real *)targets)[at[b] * outs + o], huge = d > 1 ? 1 : d < -1 ? -1 : d;
            real slope = kind == 1 ? 2 * d : huge, size = d < 0 ? -d : d;
            g[o] = slope / (rows * outs);
            sum += (kind == 1 ? d * d : size < 1 ? d * d / 2 : size - (real)0.5) / outs;
        }
    }
    return sum;
}

/* Places of all weights from one address on; the first number behind them. */
static real *lay_out(const Layer *layers, int64_t count, real *from, Place *places) {
    for (int64_t l = 0; l < count; l++) {
        places[l].w = from;
        places[l].bias = from += layers[l].out * padded(layers[l].in);
        from += padded(layers[l].out);
    }
    return from;
}

/* A layer in a model's vector; its bias is `none` where it has none. */
static Place of_vector(const Layer *a, real *flat, real *none) {
    return (Place){flat + a->weight, a->bias < 0 ? none : flat + a->bias};
}

/* to = to + factor * flat, from the model's vector to padded places; anew: to = factor * flat, and zero padding */
static void add(const Layer *layers, int64_t count, const real *flat, real factor, const Place *to, int anew) {
    for (int64_t l = 0; l < count; l++) {
        const Layer *a = layers + l;
        int64_t n = padded(a->in);
        for (int64_t o = 0; o < a->out; o++) {
            real *w = to[l].w + o * n;
            const real *f = flat + a->weight + o * a->in;
            for (int64_t i = 0; i < a->in; i++) w[i] = (anew ? 0 : w[i]) + factor * f[i];
            for (int64_t i = a->in; i < n; i++) w[i] = 0;
        }
        for (int64_t o = 0; a->bias >= 0 && o < a->out; o++)
            to[l].bias[o] = (anew ? 0 : to[l].bias[o]) + factor * flat[a->bias + o];
    }
}

/* delta = weights - start */
static void leave(const Layer *layers, int64_t count, const Place *from, const real *start, real *delta) {
    for (int64_t l = 0; l < count; l++) {
        const Layer *a = layers + l;
        for (int64_t o = 0; o < a->out; o++) {
            const real *w = from[l].w + o * padded(a->in);
            int64_t at = a->weight + o * a->in;
            for (int64_t i = 0; i < a->in; i++) delta[at + i] = w[i] - start[at + i];
        }
        for (int64_t o = 0; a->bias >= 0 && o < a->out; o++) delta[a->bias + o] = from[l].bias[o] - start[a->bias + o];
    }
}

/* Work memory, in numbers, for mini-batches of so many places, and devices with so many rows whose first layer has no
   weights of its own. */
int64_t lepton_room(const Layer *layers, int64_t count, int64_t width, int64_t rows) {
    const int64_t in = padded(layers[0].in), out = padded(layers[0].out);
    int64_t weights = 0, wide = in;
    for (int64_t l = 0; l < count; l++) {
        weights += layers[l].out * padded(layers[l].in) + padded(layers[l].out);
        wide += 2 * padded(layers[l].out);
    }
    return 3 * weights + width * wide + (rows ? in * out + rows * (out > padded(rows) ? out : padded(rows)) : 0);
}

/* --- adding up ------------------------------------------------------------------------------------ */

enum { PIECE = 4096, NEAR_SUMS = 1024, SIDE = 32 }; /* PIECE as in lepton_fl.vector */

#ifndef DOUBLE
/* The bits of the largest magnitude: they sort like magnitudes do, and NaN above all. */
static uint32_t highest(const float *delta, int64_t count) {
    uint32_t top = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, delta + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

/* The squared L2 norm, added in the order of lepton_fl.vector, and the largest magnitude (NaN if one is NaN). */
static double look(const float *delta, int64_t size, float *peak) {
    double lanes[PIECE] = {0};
    uint32_t top = 0;
    for (int64_t near = 0; near < PIECE; near += NEAR_SUMS) {
        for (int64_t from = near; from < size; from += PIECE) {
            const int64_t count = size - from < NEAR_SUMS ? size - from : NEAR_SUMS;
            const uint32_t high = highest(delta + from, count);
            top = high > top ? high : top;
            for (int64_t i = 0; i < count; i++) lanes[near + i] += (double)delta[from + i] * delta[from + i];
        }
    }
    memcpy(peak, &top, sizeof top);
    for (int64_t half = PIECE / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Squared norms and peaks of (count, size) updates, `stride` numbers apart. */
void lepton_look(const float *deltas, int64_t stride, int64_t count, int64_t size, double *squares, float *peaks) {
    for (int64_t k = 0; k < count; k++) squares[k] = look(deltas + k * stride, size, peaks + k);
}

static void add_piece(const float *delta, int64_t width, float factor, int64_t weight, int64_t *sum, double *square) {
    int32_t whole[PIECE];
    for (int64_t i = 0; i < width; i++) whole[i] = (int32_t)(delta[i] * factor);
    if (weight == 1)
        for (int64_t i = 0; i < width; i++) sum[i] += whole[i];
    else
        for (int64_t i = 0; i < width; i++) sum[i] += weight * whole[i];
    if (!square) return;
    double lanes[SIDE] = {0};
    memset(whole + width, 0, (PIECE - width) * sizeof *whole);
    for (int64_t i = 0; i < PIECE; i += SIDE)
        for (int j = 0; j < SIDE; j++) lanes[j] += (double)whole[i + j] * whole[i + j];
    for (int j = 0; j < SIDE; j++) *square += lanes[j];
}

/* sum += weight * trunc(factor * delta) of all updates whose weight is not 0; `squares` takes the squared norms of
   what was added, before the weight. Products must fit int32. */
void lepton_add(const float *deltas, int64_t stride, int64_t count, int64_t size, const float *factors,
                const int64_t *weights, int64_t *sum, double *squares) {
    for (int64_t from = 0; from < size; from += PIECE)
        for (int64_t k = 0; k < count; k++)
            if (weights[k])
                add_piece(deltas + k * stride + from, least(size - from, PIECE), factors[k], weights[k], sum + from,
                          squares ? squares + k : NULL);
}

/* The same of updates that nobody has looked at: one that holds a magnitude of `limit` or above, or NaN, is taken
   back, and its weight set to 0. */
void lepton_add_looking(const float *deltas, int64_t stride, int64_t count, int64_t size, float factor, float limit,
                        int64_t *weights, int64_t *sum) {
    uint32_t bound;
    memcpy(&bound, &limit, sizeof bound);
    for (int64_t from = 0; from < size; from += PIECE)
        for (int64_t k = 0; k < count; k++) {
            const float *delta = deltas + k * stride + from;
            const int64_t width = least(size - from, PIECE);
            if (!weights[k]) continue;
            if (highest(delta, width) < bound) {
                add_piece(delta, width, factor, weights[k], sum + from, NULL);
                continue;
            }
            for (int64_t at = 0; at < from; at += PIECE)
                add_piece(deltas + k * stride + at, PIECE, factor, -weights[k], sum + at, NULL);
            weights[k] = 0;
        }
}
#endif

/* --- orders of rows -------------------------------------------------------------------------------- */

typedef struct {
    __uint128_t state, step;
    uint64_t kept; /* the upper half of the last draw, plus 2^32 as long as it waits */
} Random;

static uint64_t draw(Random *r) { /* PCG XSL RR 128/64 (O'Neill 2014) */
    r->state = r->state * (((__uint128_t)0x2360ED051FC65DA4 << 64) + 0x4385DF649FCCF645) + r->step;
    const uint64_t mixed = (uint64_t)(r->state >> 64) ^ (uint64_t)r->state;
    const unsigned turn = (unsigned)(r->state >> 122);
    return mixed >> turn | mixed << (-turn & 63);
}

static uint32_t draw_half(Random *r) {
    const uint64_t kept = r->kept, both = kept ? 0 : draw(r);
    r->kept = kept ? 0 : both >> 32 | (uint64_t)1 << 32;
    return (uint32_t)(kept ? kept : both);
}

static uint32_t hashed(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

/* numpy's SeedSequence and PCG64 of a seed. */
static Random seeded(uint64_t seed) {
    uint32_t pool[4] = {(uint32_t)seed, seed >> 32}, constant = 0x43b0d7e5, half[8];
    for (int i = 0; i < 4; i++) pool[i] = hashed(pool[i], &constant, 0x931e8875);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            if (i == j) continue;
            const uint32_t mixed = 0xca01f9dd * pool[j] - 0x4973f715 * hashed(pool[i], &constant, 0x931e8875);
            pool[j] = mixed ^ mixed >> 16;
        }
    constant = 0x8b51f9dd;
    for (int i = 0; i < 8; i++) half[i] = hashed(pool[i % 4], &constant, 0x58f38ded);
    __uint128_t word[2] = {0, 0};
    for (int i = 0; i < 8; i++) word[i / 4] |= (__uint128_t)half[i] << ((i % 4 < 2 ? 64 : 0) + 32 * (i % 2));
    Random r = {0, word[1] << 1 | 1, 0};
    draw(&r);
    r.state += word[0];
    draw(&r);
    return r;
}

/* The rows of a device in the order of each epoch, as schedule.py draws them with numpy: (epochs, places), zeros
   where there are fewer rows than places. */
void lepton_order(uint64_t seed, int64_t rows, int64_t epochs, int64_t places, int64_t shuffled, int64_t *order) {
    Random r = seeded(seed);
    draw(&r); /* seeds torch in the trainer */
    for (int64_t *at = order; at < order + epochs * places; at += places) {
        for (int64_t i = 0; i < places; i++) at[i] = i < rows ? i : 0;
        for (int64_t i = rows - 1; shuffled && i > 0; i--) {
            const uint32_t mask = ~0u >> __builtin_clz((uint32_t)i);
            int64_t other;
            do other = draw_half(&r) & mask;
            while (other > i);
            const int64_t held = at[i];
            at[i] = at[other];
            at[other] = held;
        }
    }
}

/* --- training -------------------------------------------------------------------------------------- */

typedef struct {
    const real *start;      /* (P,) where training begins */
    const real *correction; /* (P,) added to every gradient, or NULL */
    const real *x;          /* (n, in) */
    const void *targets;    /* (n,) labels, or (n, out) numbers */
    uint64_t seed;          /* of the order of its rows */
    int64_t epochs, places, shuffled;
    const int64_t *sizes;   /* (steps,) rows that count of each mini-batch */
    int64_t width, steps;   /* places of a mini-batch; how many there are */
    int64_t examples, rows; /* the sum of the sizes; n */
    int64_t first, last;    /* the steps to be made now: all, or a part of them, one after the other */
    int64_t *at;            /* (epochs, places) the order of the rows: (steps, width) */
    real *delta;            /* (P,) weights minus start; written after the last step */
    int64_t size;           /* P */
    real *moves;            /* (n, padded out) if the first layer does without weights of its own, else NULL */
    int64_t later;          /* whether its update stays in the moves: see lepton_finish and lepton_add_moves */
    real *gram;             /* (n, n) products of its rows with each other, + 1 for a bias */
    int64_t met;            /* whether they are there; else they are computed */
} Device;

typedef struct {
    double lost;         /* the losses of all rows, each before its step, are added here */
    double square, peak; /* of delta: its squared norm, see look and reach, and largest magnitude (if not later); of float only */
} Result;

/* Have the rows of a mini-batch on their way before they are needed: they lie anywhere. */
static void fetch(const Device *d, int64_t n, int64_t t) {
    for (int64_t b = 0; t < d->last && b < d->sizes[t]; b++)
        for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(real)) __builtin_prefetch(d->x + d->at[t * d->width + b] * n + i);
}

/* --- a first layer without weights ------------------------------------------------------------------

   After some steps of plain SGD its weights are W0 + sum_j m_j x_j^T, where m_j is how far row j moved the outputs.
   So the outputs of a row are x W0^T + sum_j (x . x_j) m_j: one product of all rows with W0, one of the rows with
   each other, and a little at each step; the update is one product at the end. See dual.py. */

typedef struct {
    real *products;                 /* (n, padded out): x W0^T + bias */
    int64_t seen, order[MOST_ROWS]; /* the rows that have moved the outputs */
} Rows;

/* W0 (outs, in) -> (in, padded outs) */
static void turn(const Layer *a, const real *w, real *to) {
    const int64_t out = padded(a->out);
    for (int64_t o = 0; o < out; o += ALIGN)
        for (int64_t i = 0; i < a->in; i++)
            for (int64_t j = o; j < o + ALIGN; j++) to[i * out + j] = j < a->out ? w[j * a->in + i] : 0;
}

/* Products of n rows with each other, plus a constant: to (n, n), each pair once, the later row first. */
static void multiply(const real *x, int64_t n, int64_t in, real constant, real *to) {
    real same[MOST_ROWS];
    for (int64_t b = 0; b < n; b++) same[b] = constant;
    for (int64_t b = 0; b < n; b += ROWS)
        EACH_COUNT(n - b, forward_rows(N, x + b * in, x, same, in, 0, least(b + ROWS, n), to + b * n, n))
}

static void meet(const Layer *a, const Device *d, const real *turned, Rows *r) {
    const int64_t out = padded(a->out), n = d->rows;
    back(d->x, (Place){(real *)turned, 0}, n, out, a->in, a->in, r->products);
    for (int64_t b = 0; a->bias >= 0 && b < n; b++)
        for (int64_t o = 0; o < a->out; o++) r->products[b * out + o] += d->start[a->bias + o];
    if (!d->met) multiply(d->x, n, a->in, a->bias >= 0, d->gram); /* in a bias, all rows have a 1 */
    for (int64_t b = 0; !d->met && b < n; b++)
        for (int64_t j = b + 1; j < n; j++) d->gram[b * n + j] = d->gram[j * n + b];
    memset(d->moves, 0, n * out * sizeof(real));
}

/* y (N, outs) = products + gram moves, of rows `at` */
INLINE void recall_tile(int nb, int nk, const Rows *r, const Device *d, const int64_t *at, int64_t k, int64_t wide, real *y) {
    vec sum[ROWS][4];
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int i = 0; i < nk; i++) sum[b][i] = AT(r->products + at[b] * wide + k + i * LANES);
    for (int64_t j = 0; j < r->seen; j++) {
        vec u[4];
        UNROLL for (int i = 0; i < nk; i++) { u[i] = AT(d->moves + r->order[j] * wide + k + i * LANES); HOLD(u[i]); }
        UNROLL for (int b = 0; b < nb; b++) UNROLL for (int i = 0; i < nk; i++) sum[b][i] += d->gram[at[b] * d->rows + r->order[j]] * u[i];
    }
    UNROLL for (int b = 0; b < nb; b++) UNROLL for (int i = 0; i < nk; i++) AT(y + b * wide + k + i * LANES) = sum[b][i];
}

INLINE void recall_rows(int nb, const Rows *r, const Device *d, const int64_t *at, int64_t wide, real *y) {
    int64_t k = 0;
    for (; k + MANY * LANES <= wide; k += MANY * LANES) recall_tile(nb, MANY, r, d, at, k, wide, y);
    for (; k < wide; k += LANES) recall_tile(nb, 1, r, d, at, k, wide, y);
}

static void recall(const Rows *r, const Device *d, const int64_t *at, int64_t size, int64_t wide, real *y) {
    for (int64_t b = 0; b < size; b += ROWS) EACH_COUNT(size - b, recall_rows(N, r, d, at + b, wide, y + b * wide))
}

/* Note how far a mini-batch moves the outputs; in the first epoch, its rows are new. */
static void move(Rows *r, const Device *d, const int64_t *at, int64_t size, int64_t wide, const real *g) {
    for (int64_t b = 0; b < size; b++) {
        if (r->seen < d->rows) r->order[r->seen++] = at[b];
        for (int64_t o = 0; o < wide; o++) d->moves[at[b] * wide + o] += g[b * wide + o];
    }
}

/* A tile of the update of W0, from output o and input k on. */
INLINE void finish_tile(int no, int nk, const Layer *a, const Device *d, int64_t o, int64_t k, vec sum[4][4]) {
    UNROLL for (int i = 0; i < no; i++) UNROLL for (int j = 0; j < nk; j++) sum[i][j] = (vec){0};
    outer_tile(no, nk, d->x + k, d->moves + o, d->rows, a->in, padded(a->out), sum);
}

INLINE void finish_panel(int nk, const Layer *a, const Device *d, int64_t k) {
    for (int64_t o = 0; o < a->out; o += 4) {
        vec sum[4][4];
        finish_tile(4, nk, a, d, o, k, sum);
        UNROLL for (int i = 0; i < 4; i++) memcpy(d->delta + a->weight + (o + i) * a->in + k, sum[i], nk * BYTES);
    }
}

static void finish(const Layer *a, const Device *d) {
    int64_t k = 0;
    for (; k + MANY * LANES <= a->in; k += MANY * LANES) finish_panel(MANY, a, d, k);
    for (; k < a->in; k += LANES) finish_panel(1, a, d, k);
}

/* Write the updates of devices that were left for later. */
void lepton_finish(const Layer *layers, const Device *devices, int64_t number) {
    for (const Device *d = devices; d < devices + number; d++)
        finish(layers, d);
}

#ifndef DOUBLE
/* The squared norm of an update from the products of its rows and moves, and no less than that of what finish and
   add_panel compute: bounds of all rounding are in it, some 1e-4 of it. Rows and moves are short vectors, so this
   costs a fraction of a look at all weights, which need not even be written. Room: (n, n). */
static double reach(const Layer *a, const Device *d, real *room) {
    const int64_t n = d->rows, out = padded(a->out), past = a->weight + a->out * a->in;
    const double unit = 1.0 / (1 << 24), deepest = (double)(a->in > a->out ? a->in : a->out) / LANES + 16;
    double sum = 0, most = 0, rest = 0;
    multiply(d->moves, n, out, 0, room);
    for (int64_t b = 0; b < n; b++) {
        const real *moved = room + b * n, *met = d->gram + b * n;
        double row = 0;
        for (int64_t j = 0; j < b; j++) row += (double)moved[j] * met[j];
        sum += 2 * row + (double)moved[b] * met[b];
        most += sqrt((double)moved[b] * met[b]);
    }
    const double length = sqrt(fmax(sum, 0) + 2 * deepest * unit * most * most) + n * unit * most;
    for (int64_t i = a->weight ? 0 : past; i < d->size; i = i + 1 == a->weight ? past : i + 1)
        if (a->bias < 0 || i < a->bias || i >= a->bias + a->out) /* the bias is in the products */
            rest += (double)d->delta[i] * d->delta[i];
    return length * length + rest;
}

typedef int32_t bits __attribute__((vector_size(BYTES)));
typedef int64_t whole __attribute__((vector_size(2 * BYTES), aligned(8)));

/* Add a panel of the update of W0 as whole grid steps, `tiles` of it at most; how many were added before one that
   holds a magnitude of `bound` or above. */
INLINE int64_t add_panel(int nk, const Layer *a, const Device *d, int64_t k, int64_t tiles, float factor, int32_t bound,
                         int64_t weight, int64_t *sum, double *square, const Device *next) {
    vec squares = {0};
    for (int64_t o = 0, tile = 0; tile < tiles && o < a->out; o += 4, tile++) {
        vec found[4][4];
        bits over = {0};
        for (int64_t b = tile; next && b < next->rows; b += a->out / 4)
            UNROLL for (int j = 0; j < nk; j++) __builtin_prefetch(next->x + b * a->in + k + j * LANES);
        finish_tile(4, nk, a, d, o, k, found);
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < nk; j++) over |= bound - 1 - ((bits)found[i][j] & 0x7fffffff);
        int32_t any = 0;
        UNROLL for (int i = 0; i < BYTES / 4; i++) any |= over[i];
        if (any < 0) return tile;
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < nk; j++) {
            whole *to = (whole *)(sum + (o + i) * a->in + k + j * LANES);
            vec scaled = found[i][j] * factor;
            whole steps = __builtin_convertvector(__builtin_convertvector(scaled, bits), whole);
            squares += scaled * scaled;
            *to += weight == 1 ? steps : weight * steps;
        }
    }
    *square += total(squares);
    return tiles;
}

static int64_t add_some(const Layer *a, const Device *d, int64_t k, int64_t wide, int64_t tiles, float factor, int32_t bound,
                        int64_t weight, int64_t *sum, double *square, const Device *next) {
    if (wide > LANES) return add_panel(MANY, a, d, k, tiles, factor, bound, weight, sum + a->weight, square, next);
    return add_panel(1, a, d, k, tiles, factor, bound, weight, sum + a->weight, square, next);
}

/* Add what an update holds besides W0. */
static void add_rest(const Layer *a, const Device *d, float factor, int64_t weight, int64_t *sum, double *square) {
    const int64_t past = a->weight + a->out * a->in;
    for (int64_t at = 0; at < a->weight; at += PIECE)
        add_piece(d->delta + at, least(a->weight - at, PIECE), factor, weight, sum + at, square);
    for (int64_t at = past; at < d->size; at += PIECE)
        add_piece(d->delta + at, least(d->size - at, PIECE), factor, weight, sum + at, square);
}

/* Squared norms of the updates of devices that were left for later; see reach. Room: (n, n) of the largest. */
void lepton_reach(const Layer *layers, const Device *devices, int64_t number, real *room, double *squares) {
    for (int64_t i = 0; i < number; i++) squares[i] = reach(layers, devices + i, room);
}

/* As lepton_add and lepton_add_looking, of devices that were left for later: their updates are never written. The
   squared norms are not exact, and those of what was scaled rather than of whole steps, which are no longer. */
void lepton_add_moves(const Layer *layers, const Device *devices, int64_t number, const float *factors, float limit,
                      int64_t *weights, int64_t *sum, double *squares) {
    const Layer *a = layers;
    const int64_t past = a->weight + a->out * a->in, tiles = a->out / 4;
    int32_t bound;
    memcpy(&bound, &limit, sizeof bound);
    for (int64_t i = 0; i < number; i++) {
        const Device *d = devices + i;
        const uint32_t first = highest(d->delta, a->weight), second = highest(d->delta + past, d->size - past);
        if (first >= (uint32_t)bound || second >= (uint32_t)bound) weights[i] = 0;
        if (weights[i]) add_rest(a, d, factors[i], weights[i], sum, squares + i);
    }
    for (int64_t k = 0, wide; k < a->in; k += wide) {
        wide = k + MANY * LANES <= a->in ? MANY * LANES : LANES; /* so much of the sum stays near */
        for (int64_t i = 0; i < number; i++) {
            const Device *d = devices + i;
            const float factor = factors[i];
            const int64_t weight = weights[i];
            if (!weight) continue;
            const int64_t done = add_some(a, d, k, wide, tiles, factor, bound, weight, sum, squares + i, i + 1 < number ? d + 1 : NULL);
            if (done == tiles) continue;
            add_rest(a, d, factor, -weight, sum, squares + i);
            for (int64_t back = 0, step; back <= k; back += step) {
                step = back + MANY * LANES <= a->in ? MANY * LANES : LANES;
                add_some(a, d, back, step, back < k ? tiles : done, factor, bound, -weight, sum, squares + i, NULL);
            }
            weights[i] = 0;
        }
    }
}
#endif

static double train(const Layer *layers, int64_t count, int64_t kind, const Rule *rule, const Device *d, int64_t places,
                    real *work, const real *turned, Result *result) {
    (void)result;
    Place value[MOST], moving[MOST], shift[MOST], now[MOST];
    real *rows[MOST + 1], *grads[MOST];
    real *moves = lay_out(layers, count, work, value), *shifts = lay_out(layers, count, moves, moving);
    real *free = lay_out(layers, count, shifts, shift);
    for (int64_t l = 0; l <= count; l++) {
        rows[l] = free;
        free += places * padded(l < count ? layers[l].in : layers[l - 1].out);
    }
    for (int64_t l = 0; l < count; l++) {
        grads[l] = free;
        free += places * padded(layers[l].out);
    }
    const int bare = d->moves != NULL;
    Rows own = {.products = (real *)turned + layers->in * padded(layers->out)};
    if (bare) meet(layers, d, turned, &own);
    const int momentum = rule->momentum != 0, drift = rule->mu != 0 || d->correction;
    const real rate = rule->rate, pull = rule->decay + rule->mu;
    const real keep = momentum ? rule->momentum : 1 - rule->rate * (rule->decay + rule->mu), scale = momentum ? 1 : -rate;
    const int64_t weights = moves - work;
    if (!bare) fetch(d, layers->in, d->first);
    /* Where the model's vector is laid out as the weights are, the first step reads it and the last one writes delta. */
    int direct = !momentum && !drift && ((uintptr_t)d->start | (uintptr_t)d->delta) % BYTES == 0;
    for (int64_t l = bare; l < count; l++) direct &= layers[l].in % ALIGN == 0 && layers[l].weight % ALIGN == 0;
    if (!d->first && !direct) {
        add(layers + bare, count - bare, d->start, 1, value + bare, 1);
        if (momentum) memset(moves, 0, weights * sizeof(real));
        if (drift) add(layers, count, d->start, momentum ? -rule->mu : rule->rate * rule->mu, shift, 1);
        if (d->correction) add(layers, count, d->correction, scale, shift, 0);
    }
    double sum = 0;
    for (int64_t t = d->first; t < d->last; t++) {
        const int64_t size = d->sizes[t], *at = d->at + t * d->width;
        for (int64_t b = 0; !bare && b < size; b++)
            memcpy(rows[0] + b * padded(layers->in), d->x + at[b] * layers->in, layers->in * sizeof(real));
        if (!bare) fetch(d, layers->in, t + 1);
        for (int64_t l = 0; l < count; l++) {
            const int64_t n = padded(layers[l].in), wide = padded(layers[l].out);
            real *y = rows[l + 1];
            now[l] = direct && !t ? of_vector(layers + l, (real *)d->start, value[l].bias) : value[l];
            if (bare && !l) recall(&own, d, at, size, wide, y);
            else forward(rows[l], now[l], size, n, layers[l].out, y, wide);
            for (int64_t i = 0; layers[l].relu && i < size * wide; i++) y[i] = y[i] < 0 ? 0 : y[i]; /* NaN stays */
        }
        sum += lose(kind, rows[count], d->targets, at, size, layers[count - 1].out,
                    padded(layers[count - 1].out), grads[count - 1]);
        for (int64_t l = count - 1; l >= 0; l--) {
            const int64_t n = padded(layers[l].in), outs = layers[l].out, wide = padded(outs);
            real *g = grads[l], *y = rows[l + 1];
            for (int64_t i = 0; layers[l].relu && i < size * wide; i++) g[i] = y[i] <= 0 ? 0 : g[i];
            if (l) back(g, now[l], size, n, outs, wide, grads[l - 1]);
            for (int64_t i = 0; i < size * wide; i++) g[i] *= scale;
            if (bare && !l) { move(&own, d, at, size, wide, g); continue; }
            const int last = direct && t + 1 == d->steps;
            Place into = last ? of_vector(layers + l, d->delta, NULL) : momentum ? moving[l] : value[l];
            Place less = last ? of_vector(layers + l, (real *)d->start, NULL) : (Place){0, 0};
            if (layers[l].bias < 0) into.bias = NULL;
            const Move move = {momentum ? moving[l] : now[l], into, less};
            descend(rows[l], g, size, n, outs, wide, keep, &move);
        }
        for (int64_t i = 0; momentum && i < weights; i++) {
            moves[i] += pull * work[i] + (drift ? shifts[i] : 0);
            work[i] -= rate * moves[i];
        }
        for (int64_t i = 0; drift && !momentum && i < weights; i++) work[i] += shifts[i];
    }
    if (d->last < d->steps) return sum;
    if (!direct) leave(layers + bare, count - bare, value + bare, d->start, d->delta);
    for (int64_t o = 0; bare && layers->bias >= 0 && o < layers->out; o++) {
        real far = 0;
        for (int64_t b = 0; b < d->rows; b++) far += d->moves[b * padded(layers->out) + o];
        d->delta[layers->bias + o] = far;
    }
    if (d->later) return sum;
    if (bare) finish(layers, d);
#ifndef DOUBLE
    float peak;
    result->square = look(d->delta, d->size, &peak); /* while it is near */
    result->peak = peak;
    const double bounded = bare ? reach(layers, d, own.products) : INFINITY;
    if (bounded < INFINITY) result->square = bounded; /* as for those that are left for later */
#endif
    return sum;
}

/* Trains devices one after the other.

   layers, count   at most MOST
   places          at least the width of each device
   work            lepton_room() numbers at a multiple of 64 bytes: zeros at first, then left alone */
void lepton_train(const Layer *layers, int64_t count, int64_t kind, const Rule *rule, const Device *devices, int64_t number,
                  int64_t places, real *work, Result *results) {
    real *turned = work + lepton_room(layers, count, places, 0);
    const real *from = NULL; /* whose first layer that is */
    for (int64_t i = 0; i < number; i++) {
        const Device *d = devices + i;
        if (!d->first) lepton_order(d->seed, d->rows, d->epochs, d->places, d->shuffled, d->at);
        if (d->moves && d->start != from) turn(layers, (from = d->start) + layers->weight, turned);
        results[i].lost += train(layers, count, kind, rule, d, places, work, turned, results + i);
    }
}
