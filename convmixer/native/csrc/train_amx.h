// The convolutions of a training step in bfloat16 on AMX, with float32 sums.
//
// A panel, the right operand of a matrix multiplication, holds bundles of 16 columns: (columns / 16, inputs / 2, 16, 2). The left
// operand is rows of 32 inputs, either packed to whole tiles of 1 KiB or with a stride.
//
// Depthwise. A plane is the image of one channel with zeros around it, rows `stride` values apart. One row of a kernel
// times one tile of 16 x 16 outputs is a product of 16 rows of the plane, 32 neighbours each, and a Toeplitz matrix
// (neighbours, 16), which is read from a run (see cpu_tiles.h). Four tiles share it.
//
// Its weight gradient. For row i of a kernel, tap j is the sum over n of the diagonal C[n, n + j], where C[n, m] is the
// sum over y of grad[y, n] * x[y + i, m]. So C is a product of the transposed tile of the gradient, (16, 16 y), and the
// rows of x from i on, (16 y, 32 neighbours). Two tiles fill the inner dimension of 32: pairs of their rows take turns.
// Stored with a stride of 31 values, the diagonals of C become columns, whose sums are one addition per row.

#pragma once

#include "train.h"

#ifdef CONVMIXER_TILES

namespace {

struct Amx {
    using Value = uint16_t;
    static constexpr int TILE_BYTES = 1024;

    static void begin() { configure(SIDE, SIDE); }
    static void end() { _tile_release(); }

    // ---- operands ---------------------------------------------------------------------------------------------------

    // Bytes of a bundle; one line more, as bundles must not lie a power of two apart.
    static long bundle(int inputs) { return inputs * 32L + 64; }
    // Values from row to row of a left operand that is not packed, likewise.
    static long stride(int inputs) { return inputs + 32; }

    struct Left {
        const char *data;
        long row, half, step;  // bytes from row to row, to the next 16 rows, and to the next 32 inputs
    };
    static Left packed(const Value *data, int inputs) {
        return {reinterpret_cast<const char *>(data), 64, inputs * 32L, TILE_BYTES};
    }
    static Left rows(const Value *data, int inputs) {
        const long row = stride(inputs) * 2;
        return {reinterpret_cast<const char *>(data), row, 16 * row, 64};
    }

    // Rows [first, last), in sixteens, of an (outputs, inputs) matrix given by `at(output, input)`.
    template <class At>
    static void pack(Value *to, int inputs, int first, int last, At at) {
        for (int n = first; n < last; n++)
            for (int i = 0; i < inputs; i++)
                to[(long)n / 16 * 16 * inputs + i / 32 * 512 + n % 16 * 32 + i % 32] = to_bf16(at(n, i));
    }

    // Inputs i and i + 1 of a panel, an even i, at 32 columns.
    static void put(char *panel, long bundle, int i, int column, const __m512 (&a)[2], const __m512 (&b)[2]) {
        const __m512i order = _mm512_add_epi16(  // 0 16 1 17 ...
            _mm512_srli_epi32(_mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), 1),
            _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
        char *to = panel + column / SIDE * bundle + i * 32L;
        _mm512_store_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b[0], a[0])));
        _mm512_store_si512(to + bundle, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b[1], a[1])));
    }
    // 32 neighbours of a row.
    static void put_row(Value *to, const __m512 (&v)[2]) {
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
    }
    // 32 inputs of 16 rows, `row` values apart, as inputs [i, i + 32) of a bundle whose columns the rows are.
    static void put_transposed(char *bundle, int i, const Value *from, long row) {
        __m512i lines[16];
        for (int n = 0; n < 16; n++) lines[n] = _mm512_load_si512(from + n * row);
        transpose(lines);
        for (int n = 0; n < 16; n++) _mm512_store_si512(bundle + (i / 2 + n) * 64L, lines[n]);
    }

    // ---- matrix multiplication ------------------------------------------------------------------------------------------

    static void four(const Left &a, const char *left, const char *right, long bundle) {
        _tile_loadd(4, left, a.row);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + bundle, 64);
        _tile_loadd(5, left + a.half, a.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    // `finish(row, column, v)` gets each row of 32 columns; between the multiplications of the next block.
    template <class Finish>
    static void multiply(const Left &a, const char *panel, int inputs, int outputs, int columns, Finish finish) {
        alignas(64) float sums[2][BLOCK * BLOCK];
        const int steps = inputs / 32, rate = (BLOCK + steps - 1) / steps;
        int ready = -1, ready_n = 0, ready_m = 0;  // which of the sums are finished next, and where they belong
        auto finish_row = [&](int i) {
            const float *sum = sums[ready] + i * BLOCK;
            finish(ready_n + i, ready_m, _mm512_load_ps(sum), _mm512_load_ps(sum + LANES));
        };
        settle();
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK) {
                const char *left = a.data + n / SIDE * a.half;
                const char *right = panel + m / SIDE * bundle(inputs);
                int row = 0;
                clear();
                for (int i = 0; i < steps; i++, left += a.step, right += TILE_BYTES) {
                    four(a, left, right, bundle(inputs));
                    if (ready >= 0)
                        for (int j = 0; j < rate && row < BLOCK; j++) finish_row(row++);
                }
                const int now = ready == 0 ? 1 : 0;
                store_square(sums[now]);
                settle();
                ready = now, ready_n = n, ready_m = m;
            }
        for (int row = 0; row < BLOCK; row++) finish_row(row);
    }

    // Adds to `sums`, blocks of (32, 32).
    static void accumulate(const Left &a, const char *panel, int inputs, int outputs, int columns, float *sums) {
        settle();
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK, sums += BLOCK * BLOCK) {
                const char *left = a.data + n / SIDE * a.half;
                const char *right = panel + m / SIDE * bundle(inputs);
                _tile_loadd(0, sums, 128);
                _tile_loadd(1, sums + 16, 128);
                _tile_loadd(2, sums + 512, 128);
                _tile_loadd(3, sums + 528, 128);
                for (int i = 0; i < inputs; i += 32, left += a.step, right += TILE_BYTES)
                    four(a, left, right, bundle(inputs));
                store_square(sums);
            }
        settle();
    }

    // ---- depthwise --------------------------------------------------------------------------------------------------

    struct Kernel {
        alignas(64) uint32_t runs[LARGEST * RUN] = {};

        // Of (k, k) weights; flipped: turned by half a circle.
        void set(const float *weight, int k, bool flipped) {
            const __mmask16 taps = (1u << k) - 1;
            const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i back = _mm512_sub_epi32(_mm512_set1_epi32(k - 1), place);
            uint32_t *run = runs + RUN - 1 - SIDE - k;
            for (int y = 0; y < k; y++, run += RUN) {
                __m512 row = _mm512_maskz_loadu_ps(taps, weight + (flipped ? k - 1 - y : y) * k);
                if (!flipped) row = _mm512_maskz_permutexvar_ps(taps, back, row);
                const __m512i w = _mm512_cvtepu16_epi32(narrowed(row));
                const __m512i next = _mm512_maskz_expand_epi32(0xfffe, w);
                _mm512_storeu_si512(run, _mm512_or_si512(w, _mm512_slli_epi32(next, 16)));
            }
        }
    };

    // Four tiles (16, 16) of outputs, whose upper left neighbours are given.
    static void convolve(const Value *const (&corners)[4], long stride, const Kernel &kernel, int k,
                         float (&sums)[4][SIDE * SIDE]) {
        const uint32_t *run = kernel.runs + RUN - 2 - SIDE;
        settle();
        clear();
        for (int y = 0; y < k; y++, run += RUN) {
            _tile_loadd(6, run, -8);
            _tile_loadd(4, corners[0] + y * stride, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, corners[1] + y * stride, stride * 2);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(4, corners[2] + y * stride, stride * 2);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, corners[3] + y * stride, stride * 2);
            _tile_dpbf16ps(3, 5, 6);
        }
        store_each(sums);
        settle();
    }

    // What the weight gradient of up to four tiles multiplies.
    struct Operands {
        static constexpr int ROWS = SIDE + LARGEST - 1, STARTS = ROWS / 2;  // of x; of pairs of rows from even ones on
        alignas(64) uint32_t left[2][SIDE][SIDE];              // (pairs of tiles, columns, pairs of rows of both in turn)
        alignas(64) uint32_t right[2][2][STARTS][2][2][SIDE];  // (pairs of tiles, odd start, start, tile, half, column)
        int pairs;
    };
    // `corners` are those of x, `grads` those of the gradient.
    static void arrange(const Value *const (&corners)[4], const Value *const (&grads)[4], int count, long stride, int k,
                        Operands &operands) {
        const __m512i low = _mm512_add_epi16(  // 0 32 1 33 ...
            _mm512_srli_epi32(_mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), 1),
            _mm512_slli_epi32(_mm512_set_epi32(47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32), 16));
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        operands.pairs = (count + 1) / 2;
        for (int pair = 0; pair < operands.pairs; pair++) {
            __m512i lines[16];
            for (int tile = 0; tile < 2; tile++) {
                const bool real = 2 * pair + tile < count;
                const Value *grad = grads[2 * pair + tile];
                for (int y = 0; y < 8; y++, grad += 2 * stride) {
                    const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)grad));
                    const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(grad + stride)));
                    lines[2 * y + tile] = real ? _mm512_permutex2var_epi16(a, low, b) : _mm512_setzero_si512();
                }
                const Value *x = corners[2 * pair + tile];
                __m512i a = _mm512_loadu_si512(x);
                for (int start = 0; start < SIDE + k - 2; start++) {
                    const __m512i b = _mm512_loadu_si512(x + (start + 1) * stride);
                    uint32_t(&to)[2][SIDE] = operands.right[pair][start % 2][start / 2][tile];
                    _mm512_store_si512(to[0], _mm512_permutex2var_epi16(a, low, b));
                    _mm512_store_si512(to[1], _mm512_permutex2var_epi16(a, high, b));
                    a = b;
                }
            }
            transpose(lines);
            for (int n = 0; n < SIDE; n++) _mm512_store_si512(operands.left[pair][n], lines[n]);
        }
    }
    // Adds to a lane for each row of the kernel.
    static void correlate(const Operands &operands, int k, Lane *sums) {
        constexpr int DIAGONAL = 31;
        alignas(64) float products[2][SIDE * BLOCK];
        const auto &left = operands.left;
        const auto &right = operands.right;
        settle();
        for (int i = 0; i < k; i += 2) {
            const bool two = i + 1 < k;
            clear();
            for (int pair = 0; pair < operands.pairs; pair++) {
                _tile_loadd(4, left[pair], 64);
                _tile_loadd(6, right[pair][0][i / 2], 128);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right[pair][0][i / 2][0][1], 128);
                _tile_dpbf16ps(1, 4, 7);
                if (two) {
                    _tile_loadd(6, right[pair][1][i / 2], 128);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_loadd(7, right[pair][1][i / 2][0][1], 128);
                    _tile_dpbf16ps(3, 4, 7);
                }
            }
            // The right half first: its last column, which no tap needs, lies where the next row begins.
            _tile_stored(1, products[0] + SIDE, DIAGONAL * 4);
            _tile_stored(0, products[0], DIAGONAL * 4);
            if (two) {
                _tile_stored(3, products[1] + SIDE, DIAGONAL * 4);
                _tile_stored(2, products[1], DIAGONAL * 4);
            }
            settle();
            for (int row = 0; row < (two ? 2 : 1); row++) {
                __m512 sum = _mm512_load_ps(products[row]);
                for (int n = 1; n < SIDE; n++) sum = _mm512_add_ps(sum, _mm512_load_ps(products[row] + n * BLOCK));
                add_to(sums[i + row], sum);
            }
        }
    }
};

}  // namespace

#endif
