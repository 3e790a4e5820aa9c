// The convolutions of a training step in float32 on AVX-512: matrix multiplications where there is no AMX, for maps in
// float32 and bfloat16, and depthwise convolutions, for maps in float32 everywhere.
//
// The interface is that of train_amx.h. A bundle of a panel is (inputs, 16 columns), a left operand is rows of inputs. A
// multiplication computes 8 rows of 32 columns in registers. Depthwise, a row of 16 outputs adds up shifted rows of the plane.

#pragma once

#include <type_traits>

#include "train.h"

namespace {

// Calls `work` with n, from N to LAST, as a constant.
template <int LAST, int N = 1, class Work>
inline void with_constant(int n, Work work) {
    if constexpr (N < LAST)
        if (n != N) return with_constant<LAST, N + 1>(n, work);
    work(std::integral_constant<int, N>());
}

constexpr int ROWS_AT_ONCE = 8;  // of sums, in registers

struct FmaGemm {
    using Value = float;
    static constexpr int PARTS = 1, ROWS = ROWS_AT_ONCE;

    static void begin() {}
    static void end() {}

    // ---- operands ---------------------------------------------------------------------------------------------------

    static long bundle(int inputs) { return inputs * 64L + 64; }
    static long stride(int inputs) { return inputs + 16; }

    struct Left {
        const float *data;
        long row;
    };
    static Left packed(const Value *data, int inputs) { return {data, inputs}; }
    static Left rows(const Value *data, int inputs) { return {data, stride(inputs)}; }

    template <class At>
    static void pack(Value *to, int inputs, int first, int last, At at) {
        for (int n = first; n < last; n++)
            for (int i = 0; i < inputs; i++) to[(long)n * inputs + i] = at(n, i);
    }

    static void put(char *panel, long bundle, int i, int column, const __m512 (&a)[2], const __m512 (&b)[2]) {
        char *to = panel + column / SIDE * bundle + i * 64L;
        _mm512_store_ps(to, a[0]);
        _mm512_store_ps(to + 64, b[0]);
        _mm512_store_ps(to + bundle, a[1]);
        _mm512_store_ps(to + bundle + 64, b[1]);
    }
    static void put_row(Value *row, int i, const __m512 (&v)[2]) {
        _mm512_store_ps(row + i, v[0]);
        _mm512_store_ps(row + i + LANES, v[1]);
    }
    static void put_transposed(char *bundle, int i, const Value *from, int inputs) {
        const long row = stride(inputs);
        for (int half = 0; half < 2; half++) {
            __m512i lines[16];
            for (int n = 0; n < 16; n++) lines[n] = _mm512_load_si512(from + n * row + i + half * LANES);
            transpose(lines);
            for (int n = 0; n < 16; n++) _mm512_store_si512(bundle + (i + half * LANES + n) * 64L, lines[n]);
        }
    }

    // ---- matrix multiplication ------------------------------------------------------------------------------------------

    // `take(row, a, b)` gets the sums of each row of a block, which begin with what `start(row)` gives.
    template <class Start, class Take>
    static void block(const Left &a, const char *right, long bundle, int inputs, int n, Start start, Take take) {
        for (int first = 0; first < BLOCK; first += ROWS) {
            const float *left = a.data + (n + first) * a.row;
            __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) start(first + r, low[r], high[r]);
            const char *line = right;
            for (int i = 0; i < inputs; i++, line += 64) {
                const __m512 v = _mm512_load_ps(line), w = _mm512_load_ps(line + bundle);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const __m512 weight = _mm512_set1_ps(left[r * a.row + i]);
                    low[r] = _mm512_fmadd_ps(weight, v, low[r]);
                    high[r] = _mm512_fmadd_ps(weight, w, high[r]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) take(first + r, low[r], high[r]);
        }
    }

    template <class Finish>
    static void multiply(const Left &a, const char *panel, int inputs, int outputs, int columns, Finish finish) {
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK)
                block(
                    a, panel + m / SIDE * bundle(inputs), bundle(inputs), inputs, n,
                    [](int, __m512 &v, __m512 &w) { v = w = _mm512_setzero_ps(); },
                    [&](int row, __m512 v, __m512 w) { finish(n + row, m, v, w); });
    }

    static void accumulate(const Left &a, const char *panel, int inputs, int outputs, int columns, float *sums) {
        for (int n = 0; n < outputs; n += BLOCK)
            for (int m = 0; m < columns; m += BLOCK, sums += BLOCK * BLOCK)
                block(
                    a, panel + m / SIDE * bundle(inputs), bundle(inputs), inputs, n,
                    [&](int row, __m512 &v, __m512 &w) {
                        v = _mm512_load_ps(sums + row * BLOCK), w = _mm512_load_ps(sums + row * BLOCK + LANES);
                    },
                    [&](int row, __m512 v, __m512 w) {
                        _mm512_store_ps(sums + row * BLOCK, v), _mm512_store_ps(sums + row * BLOCK + LANES, w);
                    });
    }

};

struct FmaDepthwise {
    using Value = float;
    static constexpr int ROWS = ROWS_AT_ONCE;

    struct Kernel {
        float taps[LARGEST * LARGEST] = {};
        void set(const float *weight, int k, bool flipped) {
            for (int i = 0; i < k * k; i++) taps[i] = weight[flipped ? k * k - 1 - i : i];
        }
    };

    static void convolve(const Value *const (&corners)[4], long stride, const Kernel &kernel, int k,
                         float (&sums)[4][SIDE * SIDE]) {
        with_constant<LARGEST>(k, [&](auto size) {
            for (int tile = 0; tile < 4; tile++)
                for (int first = 0; first < SIDE; first += ROWS)
                    convolve_rows<size>(corners[tile] + first * stride, stride, kernel, sums[tile] + first * SIDE);
        });
    }
    // ROWS rows of outputs. What is loaded of a row of the plane serves all outputs that have it as a neighbour.
    template <int K>
    static void convolve_rows(const Value *corner, long stride, const Kernel &kernel, float *to) {
        __m512 sum[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_ps();
        for (int x = 0; x < K; x++) {
            __m512 weight[K];
#pragma GCC unroll 15
            for (int y = 0; y < K; y++) weight[y] = _mm512_set1_ps(kernel.taps[y * K + x]);
#pragma GCC unroll 22
            for (int row = 0; row < ROWS + K - 1; row++) {
                const __m512 neighbours = _mm512_loadu_ps(corner + row * stride + x);
#pragma GCC unroll 15
                for (int y = 0; y < K; y++)
                    if (row >= y && row - y < ROWS) sum[row - y] = _mm512_fmadd_ps(weight[y], neighbours, sum[row - y]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) _mm512_store_ps(to + r * SIDE, sum[r]);
    }

    struct Operands {
        const Value *corners[4], *grads[4];
        int count;
        long stride;
    };
    static void arrange(const Value *const (&corners)[4], const Value *const (&grads)[4], int count, long stride, int,
                        Operands &operands) {
        std::copy(corners, corners + 4, operands.corners), std::copy(grads, grads + 4, operands.grads);
        operands.count = count, operands.stride = stride;
    }
    static void correlate(const Operands &operands, int k, Lane *sums) {
        for (int y = 0; y < k; y++)
            for (int first = 0; first < k; first += ROWS)
                with_constant<ROWS>(std::min(k - first, ROWS), [&](auto taps) {
                    correlate_taps<taps>(operands, y, first, sums[y] + first);
                });
    }
    // COUNT taps of row y of the kernel, the given one first.
    template <int COUNT>
    static void correlate_taps(const Operands &operands, int y, int first, float *to) {
        __m512 sum[COUNT];
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; j++) sum[j] = _mm512_setzero_ps();
        for (int tile = 0; tile < operands.count; tile++)
            for (int r = 0; r < SIDE; r++) {
                const __m512 grad = _mm512_loadu_ps(operands.grads[tile] + r * operands.stride);
                const float *from = operands.corners[tile] + (r + y) * operands.stride + first;
#pragma GCC unroll 8
                for (int j = 0; j < COUNT; j++) sum[j] = _mm512_fmadd_ps(grad, _mm512_loadu_ps(from + j), sum[j]);
            }
        for (int j = 0; j < COUNT; j++) to[j] += _mm512_reduce_add_ps(sum[j]);
    }
};

}  // namespace
