// What the training kernels share: the records that Python fills, values in registers, sums, and matrix operands.
//
// A feature map lies in memory as (images, channels, positions): planar, each row of an image filled up to whole strips
// of 16 columns, and all of its rows to a multiple of 32 positions. What fills up holds any finite number and counts
// nowhere: `Grid::masks` says which positions are real. Channels are filled up to a multiple of 32 with zero weights.

#pragma once

#include <cmath>
#include <vector>

#include "cpu_tiles.h"

// ---- records, known to native/training.py ---------------------------------------------------------------------------

// A convolution with the activation and the BatchNorm after it. The gradients are written by the backward pass.
struct Layer {
    const float *weight, *bias;             // (outputs, inputs per group, k, k), (outputs)
    const float *norm_weight, *norm_bias;   // (dim)
    const float *mean, *var;                // (dim) running ones, read where `batch` is 0
    float *moments;                         // (3, dim) of this batch: mean, variance, variance without bias
    float *grad_weight, *grad_bias, *grad_norm_weight, *grad_norm_bias;
    float eps;
    int32_t batch;  // by the statistics of this batch
};

struct Step {
    int32_t batch, dim, depth, kernel_size, patch_size, in_chans, height, width;  // of images
    int32_t relu, threads;
    int32_t keep;        // 2: both maps of each block, 1: only u, and c is computed anew, 0: for no backward pass
    const float *images;  // (B, in_chans, height, width)
    const Layer *layers;  // the stem's, then depthwise and pointwise of each block
    char *kept;           // what the backward pass needs, `convmixer_bytes` of it
    char *scratch;        // room for c, one map, if it is not kept; then, backward, for the gradient
    void *features;       // (B, dim, h, w); forward: the output, backward: its gradient
};

namespace {

constexpr int LANES = 16;   // float32 values in a register
constexpr int BLOCK = 32;   // outputs and columns of one block of a matrix multiplication
constexpr int TAPS = 16;    // room for a row of a depthwise kernel

inline int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// ---- values in registers --------------------------------------------------------------------------------------------

inline __m512 widened(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline __m256i narrowed(__m512 v) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(v), 16));
#endif
}

inline __m512 load_row(const float *p) { return _mm512_loadu_ps(p); }
inline __m512 load_row(const uint16_t *p) { return widened(_mm256_loadu_si256((const __m256i *)p)); }
inline void store_row(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store_row(uint16_t *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, narrowed(v)); }
inline void store_row(float *p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
inline void store_row(uint16_t *p, __mmask16 m, __m512 v) { _mm256_mask_storeu_epi16(p, m, narrowed(v)); }

// v as memory keeps it.
inline __m512 kept_as(__m512 v, const float *) { return v; }
inline __m512 kept_as(__m512 v, const uint16_t *) { return widened(narrowed(v)); }

// exp(-x^2 / 2) / sqrt(2 pi), by a power of two: relative errors of 7e-8 and 7e-5.
template <int N>
inline __m512 density_by(const float (&terms)[N], __m512 x) {
    const __m512 power = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.72134752f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(terms, _mm512_sub_ps(power, whole)), whole);
}
inline __m512 density(__m512 x, const float *) {
    static const float terms[] = {0.000529654548f, 0.00385998252f, 0.0221441421f,
                                  0.0958343922f,   0.276525632f,   0.398942309f};
    return density_by(terms, x);
}
inline __m512 density(__m512 x, const uint16_t *) {
    static const float terms[] = {0.0220103068f, 0.096787834f, 0.276571119f, 0.398913586f};
    return density_by(terms, x);
}

struct Activated {
    __m512 value, slope;
};
template <typename T, bool RELU>
inline Activated with_slope(__m512 x) {
    if (RELU) {
        const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
        return {_mm512_max_ps(_mm512_setzero_ps(), x), _mm512_maskz_mov_ps(positive, _mm512_set1_ps(1.0f))};
    }
    const T *type = nullptr;
    const __m512 phi = normal(x, type);
    return {_mm512_mul_ps(x, phi), _mm512_fmadd_ps(x, density(x, type), phi)};
}

// rows[i] lane j becomes rows[j] lane i, of 32 bits each.
inline void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// ---- sums over images and positions ---------------------------------------------------------------------------------

// Of one thread: a register for each channel. Threads are added up in their order, in double.
using Lane = float[LANES];

inline void add_to(Lane &sum, __m512 v) { _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), v)); }
inline double total(const Lane &sum) {
    double all = 0;
    for (float value : sum) all += value;
    return all;
}

// ---- geometry -------------------------------------------------------------------------------------------------------

// Where the values of a feature map lie, and the parts in which it is computed.
struct Grid {
    int height, width, strips, columns, bands, positions, channels;
    int tile, tiles;    // positions in a part of a matrix multiplication, and how many parts an image has
    int group, groups;  // images whose depthwise convolutions are computed together, and how many such groups
    std::vector<__mmask32> masks;  // real positions of each 32

    Grid(const Step &s, int bytes) {  // of a value in a panel
        height = s.height / s.patch_size, width = s.width / s.patch_size;
        strips = (width + SIDE - 1) / SIDE, columns = strips * SIDE, bands = (height + SIDE - 1) / SIDE;
        positions = rounded_up(height * columns, BLOCK), channels = rounded_up(s.dim, BLOCK);
        const long room = std::max(256l, cache() / 5 / (bytes * channels));  // three panels and the weights fit the cache
        tiles = (positions + room - 1) / room;
        tile = rounded_up((positions + tiles - 1) / tiles, BLOCK);
        tiles = (positions + tile - 1) / tile;
        group = std::max(1, std::min(s.batch, 4 / (bands * strips)));
        groups = (s.batch + group - 1) / group;
        masks.resize(positions / BLOCK);
        for (int i = 0; i < positions; i++)
            if (i / columns < height && i % columns < width) masks[i / BLOCK] |= 1u << i % BLOCK;
    }
    __mmask16 row_mask(int strip) const {
        return width - strip * SIDE < SIDE ? (1u << (width - strip * SIDE)) - 1 : 0xffff;
    }
    long values(int images) const { return (long)images * channels * positions; }
};

}  // namespace
