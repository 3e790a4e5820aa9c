// The convolutions of a training step on AMX, with float32 sums: matrix multiplications of bfloat16 or float32, and
// depthwise convolutions of bfloat16.
//
// A value consists of parts, each a bfloat16: one for a value in bfloat16, three for one in float32, each of which is
// what the ones before leave, so that their sum is exact. Of the nine terms of a multiplication of float32, six are
// added up, the smallest first. Those left out, of second and third parts, are below 2^-21 of it and of either sign.
//
// The right operand of a matrix multiplication is a panel, in bundles of 16 columns. A bundle holds a tile of 1 KiB for
// each 32 inputs and part: (columns / 16, inputs / 32, parts, 16 pairs of inputs, 16, 2). The left operand is either
// packed to whole tiles, (outputs / 16, inputs / 32, parts, 16, 32), or rows with a stride, (inputs / 32, parts, 32) each.
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

// Lane j of each part holds those of a[j], below, and of b[j]. The largest part comes first.
inline void split(__m512 a, __m512 b, __m512i (&parts)[1]) {
    const __m512i order = _mm512_add_epi16(  // 0 16 1 17 ...
        _mm512_srli_epi32(_mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), 1),
        _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
    parts[0] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
inline void split(__m512 a, __m512 b, __m512i (&parts)[3]) {
    const __m512i upper = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
    auto cut = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
    auto pairs = [&](__m512 a, __m512 b) {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
    };
    // The first part is cut, as rounding bits would make some NaN a number; the second is rounded, and the third fits.
    const __m512 first_a = cut(_mm512_castps_si512(a)), first_b = cut(_mm512_castps_si512(b));
    const __m512 left_a = _mm512_sub_ps(a, first_a), left_b = _mm512_sub_ps(b, first_b);
    const __m512 second_a = cut(_mm512_add_epi32(_mm512_castps_si512(left_a), half));
    const __m512 second_b = cut(_mm512_add_epi32(_mm512_castps_si512(left_b), half));
    parts[0] = pairs(first_a, first_b);
    parts[1] = pairs(second_a, second_b);
    parts[2] = pairs(_mm512_sub_ps(left_a, second_a), _mm512_sub_ps(left_b, second_b));
}

template <int PARTS_>
struct TileGemm {
    using Value = uint16_t;
    static constexpr int PARTS = PARTS_;
    static constexpr int DEPTH = 32;  // inputs in a tile
    static constexpr int STEP = PARTS * TILE_BYTES;
    static constexpr int TERMS = PARTS == 1 ? 1 : 6;  // of a multiplication

    static void begin() { configure(SIDE, SIDE); }
    static void end() { _tile_release(); }

    // ---- operands ---------------------------------------------------------------------------------------------------

    // Bytes of a bundle; one line more, as bundles must not lie a power of two apart.
    static long bundle(int inputs) { return inputs * 32L * PARTS + 64; }
    // Of the parts, from row to row of a left operand that is not packed, likewise.
    static long stride(int inputs) { return (long)inputs * PARTS + 32; }

    struct Left {
        const char *data;
        long row, group, part;  // bytes from row to row, to the next 16 rows, and to the next part
    };
    static Left packed(const Value *data, int inputs) {
        return {reinterpret_cast<const char *>(data), 64, inputs * 32L * PARTS, TILE_BYTES};
    }
    static Left rows(const Value *data, int inputs) {
        const long row = stride(inputs) * sizeof(Value);
        return {reinterpret_cast<const char *>(data), row, SIDE * row, DEPTH * sizeof(Value)};
    }

    // Rows [first, last), in sixteens, of an (outputs, inputs) matrix given by `at(output, input)`.
    template <class At>
    static void pack(Value *to, int inputs, int first, int last, At at) {
        for (int n = first; n < last; n++)
            for (int i = 0; i < inputs; i += DEPTH) {
                alignas(64) float even[LANES], odd[LANES];
                for (int j = 0; j < LANES; j++) even[j] = at(n, i + 2 * j), odd[j] = at(n, i + 2 * j + 1);
                char *tile = reinterpret_cast<char *>(to) + (n / SIDE * (inputs / DEPTH) + i / DEPTH) * (long)STEP;
                put_parts(tile + n % SIDE * 64, TILE_BYTES, _mm512_load_ps(even), _mm512_load_ps(odd));
            }
    }
    // Pairs of a and b, and each part `distance` bytes behind the one before.
    static void put_parts(char *to, long distance, __m512 a, __m512 b) {
        __m512i parts[PARTS];
        split(a, b, parts);
#pragma GCC unroll 3
        for (int i = 0; i < PARTS; i++) _mm512_store_si512(to + i * distance, parts[i]);
    }

    // Inputs i and i + 1 of a panel, an even i, at 32 columns.
    static void put(char *panel, long bundle, int i, int column, const __m512 (&a)[2], const __m512 (&b)[2]) {
        char *to = panel + column / SIDE * bundle + i / DEPTH * STEP + i % DEPTH * 32L;
        put_parts(to, TILE_BYTES, a[0], b[0]);
        put_parts(to + bundle, TILE_BYTES, a[1], b[1]);
    }
    // Inputs i to i + 31 of a row of a left operand, in the order 0 16 1 17 ..., as put_transposed has them as well.
    static void put_row(Value *row, int i, const __m512 (&v)[2]) {
        put_parts(reinterpret_cast<char *>(row + i * PARTS), DEPTH * sizeof(Value), v[0], v[1]);
    }
    // Inputs i to i + 31 of a bundle, whose columns are 16 rows of a left operand.
    static void put_transposed(char *bundle, int i, const Value *from, int inputs) {
        const long row = stride(inputs);
        from += i * PARTS, bundle += i / DEPTH * STEP;
        for (int part = 0; part < PARTS; part++, from += DEPTH, bundle += TILE_BYTES) {
            __m512i lines[16];
            for (int n = 0; n < 16; n++) lines[n] = _mm512_load_si512(from + n * row);
            transpose(lines);
            for (int n = 0; n < 16; n++) _mm512_store_si512(bundle + n * 64L, lines[n]);
        }
    }

    // ---- matrix multiplication ------------------------------------------------------------------------------------------

    static void load_left(const Left &a, const char *left, int part) {
        _tile_loadd(LEFT0, left + part * a.part, a.row);
        _tile_loadd(LEFT1, left + part * a.part + a.group, a.row);
    }
    static void load_right(const char *right, long bundle, int part) {
        _tile_loadd(RIGHT0, right + part * TILE_BYTES, LINE);
        _tile_loadd(RIGHT1, right + part * TILE_BYTES + bundle, LINE);
    }
    static void add_square() {
        _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
        _tile_dpbf16ps(SUM1, LEFT0, RIGHT1);
        _tile_dpbf16ps(SUM2, LEFT1, RIGHT0);
        _tile_dpbf16ps(SUM3, LEFT1, RIGHT1);
    }
    // Adds 32 inputs to the four sums, and calls `between` after each term. Terms differ in one operand from the one
    // before, so that few tiles are loaded.
    template <class Between>
    static void add_inputs(const Left &a, const char *left, const char *right, long bundle, Between between) {
        if (PARTS == 1) {
            load_left(a, left, 0), load_right(right, bundle, 0), add_square(), between();
        } else {
            load_left(a, left, 2), load_right(right, bundle, 0), add_square(), between();
            load_left(a, left, 1), add_square(), between();
            load_right(right, bundle, 1), add_square(), between();
            load_left(a, left, 0), add_square(), between();
            load_right(right, bundle, 2), add_square(), between();
            load_right(right, bundle, 0), add_square(), between();
        }
    }

    // `finish(row, column, v)` gets each row of 32 columns; between the multiplications of the next block.
    template <class Finish>
    static void multiply(const Left &a, const char *panel, int inputs, int outputs, int columns, Finish finish) {
        alignas(64) float sums[2][BLOCK * BLOCK];
        const int terms = inputs / DEPTH * TERMS, rate = (BLOCK + terms - 1) / terms;
        int ready = -1, ready_n = 0, ready_m = 0;  // which of the sums are finished next, and where they belong
        int row = BLOCK;                           // of them, the next
        auto finish_rows = [&](int end) {
            for (; row < end; row++) {
                const float *sum = sums[ready] + row * BLOCK;
                finish(ready_n + row, ready_m, _mm512_load_ps(sum), _mm512_load_ps(sum + LANES));
            }
        };
        settle();
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK) {
                const char *left = a.data + n / SIDE * a.group;
                const char *right = panel + m / SIDE * bundle(inputs);
                clear();
                for (int i = 0; i < inputs; i += DEPTH, left += PARTS * a.part, right += STEP)
                    add_inputs(a, left, right, bundle(inputs), [&] { finish_rows(std::min(row + rate, BLOCK)); });
                ready = ready == 0 ? 1 : 0;
                store_square(sums[ready]);
                settle();
                row = 0, ready_n = n, ready_m = m;
            }
        finish_rows(BLOCK);
    }

    // Adds to `sums`, blocks of (32, 32).
    static void accumulate(const Left &a, const char *panel, int inputs, int outputs, int columns, float *sums) {
        settle();
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK, sums += BLOCK * BLOCK) {
                const char *left = a.data + n / SIDE * a.group;
                const char *right = panel + m / SIDE * bundle(inputs);
                _tile_loadd(SUM0, sums, 2 * LINE);
                _tile_loadd(SUM1, sums + 16, 2 * LINE);
                _tile_loadd(SUM2, sums + 512, 2 * LINE);
                _tile_loadd(SUM3, sums + 528, 2 * LINE);
                for (int i = 0; i < inputs; i += DEPTH, left += PARTS * a.part, right += STEP)
                    add_inputs(a, left, right, bundle(inputs), [] {});
                store_square(sums);
            }
        settle();
    }

};

struct TileDepthwise {
    using Value = uint16_t;

    struct Kernel {
        alignas(64) uint32_t runs[LARGEST * RUN] = {};

        // Of (k, k) weights; flipped: turned by half a circle.
        void set(const float *weight, int k, bool flipped) {
            const __mmask16 taps = (1u << k) - 1;
            const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i back = _mm512_sub_epi32(_mm512_set1_epi32(k - 1), lanes);
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
            _tile_loadd(RIGHT0, run, BACK);
            _tile_loadd(LEFT0, corners[0] + y * stride, stride * 2);
            _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
            _tile_loadd(LEFT1, corners[1] + y * stride, stride * 2);
            _tile_dpbf16ps(SUM1, LEFT1, RIGHT0);
            _tile_loadd(LEFT0, corners[2] + y * stride, stride * 2);
            _tile_dpbf16ps(SUM2, LEFT0, RIGHT0);
            _tile_loadd(LEFT1, corners[3] + y * stride, stride * 2);
            _tile_dpbf16ps(SUM3, LEFT1, RIGHT0);
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
                _tile_loadd(LEFT0, left[pair], LINE);
                _tile_loadd(RIGHT0, right[pair][0][i / 2], 2 * LINE);
                _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
                _tile_loadd(RIGHT1, right[pair][0][i / 2][0][1], 2 * LINE);
                _tile_dpbf16ps(SUM1, LEFT0, RIGHT1);
                if (two) {
                    _tile_loadd(RIGHT0, right[pair][1][i / 2], 2 * LINE);
                    _tile_dpbf16ps(SUM2, LEFT0, RIGHT0);
                    _tile_loadd(RIGHT1, right[pair][1][i / 2][0][1], 2 * LINE);
                    _tile_dpbf16ps(SUM3, LEFT0, RIGHT1);
                }
            }
            // The right half first: its last column, which no tap needs, lies where the next row begins.
            _tile_stored(SUM1, products[0] + SIDE, DIAGONAL * 4);
            _tile_stored(SUM0, products[0], DIAGONAL * 4);
            if (two) {
                _tile_stored(SUM3, products[1] + SIDE, DIAGONAL * 4);
                _tile_stored(SUM2, products[1], DIAGONAL * 4);
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
