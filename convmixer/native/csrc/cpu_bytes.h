// A folded ConvMixer in int8 on AMX, as cpu_tiles.h does it in bfloat16; sums are int32.
//
// A block reads and writes x as unsigned bytes, in the scale of the channel; int8.py derives scales, zero points, tables
// and lifts. What an activation gets is rounded to one of 256 values, evenly spread over the channel's range in
// calibration, and a table of the channel gives the result:
//
//   depthwise  x + table[q(depthwise(x))] - lift, with saturation, in the scale of x
//   pointwise  table[q(pointwise)]: activation, BatchNorm, and the next block's scale
//
// So the activations cost two permutations of bytes for 64 values. A tile holds 64 neighbours, which is two to four rows
// of the kernel. The patch embedding is computed in bfloat16.

#pragma once

#include "cpu_tiles.h"

#if defined(CONVMIXER_TILES) && defined(__AMX_INT8__) && defined(__AVX512VBMI__)
#define CONVMIXER_BYTES

namespace {

constexpr int LARGEST_BYTES = 13;  // kernel size

struct Table {  // of 256 bytes
    __m512i a, b, c, d;
    explicit Table(const uint8_t *p)
        : a(_mm512_loadu_si512(p)), b(_mm512_loadu_si512(p + 64)), c(_mm512_loadu_si512(p + 128)),
          d(_mm512_loadu_si512(p + 192)) {}
    __m512i operator[](__m512i index) const {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), _mm512_permutex2var_epi8(a, index, b),
                                      _mm512_permutex2var_epi8(c, index, d));
    }
};

// Return the indices in the table for four times 16 sums, saturated, in their order.
inline __m512i indices(const int32_t *a, const int32_t *b, const int32_t *c, const int32_t *d, __m512 scale,
                       __m512 offset) {
    auto index = [&](const int32_t *sums) {
        return _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), scale, offset));
    };
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i low = _mm512_packs_epi32(index(a), index(b)), up = _mm512_packs_epi32(index(c), index(d));
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, up));
}

template <int GROUPS>  // of four neighbours: 16 columns and what the kernel reaches beyond them
class Bytes : Planar {
    friend Planar;
    struct Work {  // of a thread
        alignas(64) uint8_t windows[2][4][(SIDE + LARGEST_BYTES - 1) * 64] = {};
        alignas(64) int8_t matrices[2][4][(LARGEST_BYTES + 1) / 2 * TILE_BYTES] = {};
        alignas(64) int32_t sums[2][8 * SIDE * SIDE];
        alignas(64) float stem[4 * SIDE * SIDE];
    };
    static constexpr int TOGETHER = 16 / GROUPS;  // rows of the kernel in one tile
    long plane;

  public:
    Bytes(const Model &m, const float *x, int h, int w, float *o, bool p)
        : Planar(m, x, h, w, o, p), plane(positions + 64) {}

    bool forward(int batch, int threads) const { return run(*this, batch, threads); }

  private:
    long bytes_x() const { return AHEAD + dim * plane; }
    long bytes() const {
        return bytes_x() + positions / SIDE * std::max(bundle(dim), bundle(2 * (int)model.stem_inputs));
    }
    static uint8_t *activations(char *memory) { return reinterpret_cast<uint8_t *>(memory) + AHEAD; }
    char *panel(char *memory) const { return memory + bytes_x(); }

    void embed(int task, int threads, char *memory, Work &work) const {
        const char *weights = static_cast<const char *>(model.stem);
        const int inputs = model.stem_inputs;
        const long group = inputs * 32L;  // bytes of the weights of 16 outputs
        const Affine &end = model.stem_end;
        const auto [first, last, from, to] = share(task, threads);
        configure(SIDE, SIDE);
        for (int n = from; n < to; n += 32) {
            for (int m = first; m < last; m++) {
                const char *b = panel(memory) + 2 * m * bundle(2 * inputs);
                multiply_bfloat16(weights + n / 16 * group, group, b, bundle(2 * inputs), work.stem);
                for (int i = 0; i < 32; i++) {
                    const __m512 bias = _mm512_set1_ps(end.bias[n + i]);
                    const __m512 scale = _mm512_set1_ps(end.scale[n + i]), shift = _mm512_set1_ps(end.shift[n + i]);
                    for (int j = 0; j < 32; j += 16) {
                        __m512 v = _mm512_add_ps(_mm512_load_ps(work.stem + i * 32 + j), bias);
                        v = _mm512_fmadd_ps(activate<uint16_t>(v, model.relu), scale, shift);
                        v = _mm512_min_ps(v, _mm512_set1_ps(255.0f));
                        const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_setzero_si512());
                        _mm_storeu_si128((__m128i *)(activations(memory) + (n + i) * plane + m * 32L + j),
                                         _mm512_cvtusepi32_epi8(whole));
                    }
                }
            }
        }
    }

    // ---- depthwise --------------------------------------------------------------------------------------------------

    // Of four channels and a strip of 16 columns: neighbours, TOGETHER rows side by side, (rows + k - 1, 64) each, and
    // Toeplitz matrices (groups of 4 neighbours, 16, 4), those of TOGETHER rows of the kernel on top of one another.
    void prepare(int channel, int strip, const Block &block, int top, int rows, const uint8_t *x, int slot,
                 Work &work) const {
        const __mmask32 columns_inside = inside(strip);
        const int side = rows + k - 1;
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i behind[TOGETHER], lines[SIDE + LARGEST_BYTES + 2];
#pragma GCC unroll 4
        for (int j = 1; j < TOGETHER; j++) {  // the groups before j * GROUPS, then those of another register
            const __m512i start = _mm512_set1_epi32(j * GROUPS);
            behind[j] = _mm512_mask_add_epi32(lanes, _mm512_cmpge_epi32_mask(lanes, start), _mm512_sub_epi32(lanes, start),
                                              _mm512_set1_epi32(16));
        }
        for (int i = side; i < side + TOGETHER - 1; i++) lines[i] = _mm512_setzero_si512();  // have no weight
        for (int c = 0; c < 4; c++) {
            const uint8_t *line = x + (channel + c) * plane + strip * SIDE - before;
            const __m256i zero = _mm256_set1_epi8(block.zeros[channel + c]);
            for (int i = 0, y = top - before; i < side; i++, y++) {
                const bool real = y >= 0 && y < height;
                lines[i] = _mm512_castsi256_si512(
                    _mm256_mask_loadu_epi8(zero, real ? columns_inside : 0, real ? line + (long)y * columns : x));
            }
            for (int i = 0; i < side; i++) {
                __m512i v = lines[i];
#pragma GCC unroll 4
                for (int j = 1; j < TOGETHER; j++) v = _mm512_permutex2var_epi32(v, behind[j], lines[i + j]);
                _mm512_store_si512(work.windows[slot][c] + i * 64, v);
            }
        }
        __m512i from[GROUPS];
        __mmask16 in_kernel[GROUPS];
#pragma GCC unroll 8
        for (int q = 0; q < GROUPS; q++) {
            from[q] = _mm512_add_epi32(lanes, _mm512_set1_epi32(k - 1 - 4 * q));
            in_kernel[q] = _mm512_cmplt_epu32_mask(from[q], _mm512_set1_epi32(16));
        }
        const char *kernel = static_cast<const char *>(block.kernel) + (long)channel * k * 64;
        for (int c = 0; c < 4; c++) {
            int8_t *to = work.matrices[slot][c];
            for (int y = 0, i = 0; y < k; y++, kernel += 64) {
                const __m512i values = _mm512_loadu_si512(kernel);
#pragma GCC unroll 8
                for (int q = 0; q < GROUPS; q++)
                    _mm512_store_si512(to + (i * GROUPS + q) * 64, _mm512_maskz_permutexvar_epi32(in_kernel[q], from[q], values));
                if (++i == TOGETHER) i = 0, to += TILE_BYTES;
            }
        }
    }

    void multiply(int slot, Work &work) const {
        clear();
        const auto *windows = work.windows[slot];
        const auto *matrices = work.matrices[slot];
        settle();
        for (int y = 0, i = 0; y < k; y += TOGETHER, i += TILE_BYTES) {
            _tile_loadd(RIGHT0, matrices[0] + i, LINE);
            _tile_loadd(LEFT0, windows[0] + y * 64, LINE);
            _tile_dpbusd(SUM0, LEFT0, RIGHT0);
            _tile_loadd(RIGHT1, matrices[1] + i, LINE);
            _tile_loadd(LEFT1, windows[1] + y * 64, LINE);
            _tile_dpbusd(SUM1, LEFT1, RIGHT1);
            _tile_loadd(RIGHT0, matrices[2] + i, LINE);
            _tile_loadd(LEFT0, windows[2] + y * 64, LINE);
            _tile_dpbusd(SUM2, LEFT0, RIGHT0);
            _tile_loadd(RIGHT1, matrices[3] + i, LINE);
            _tile_loadd(LEFT1, windows[3] + y * 64, LINE);
            _tile_dpbusd(SUM3, LEFT1, RIGHT1);
        }
        store_each(work.sums[slot]);
    }

    void combine(int channel, int strip, const Block &block, int slot, int top, int rows, const uint8_t *x, char *to,
                 Work &work) const {
        __m512i lines[4][4];  // four rows of 16 columns each: of each channel, for all rows
        for (int c = 0; c < 4; c++) {
            const Table table(block.tables[0] + (channel + c) * 256L);
            const __m512 scale = _mm512_set1_ps(block.gain[channel + c]), offset = _mm512_set1_ps(block.bias[channel + c]);
            const __m512i lift = _mm512_set1_epi8(block.lifts[channel + c]);
            const uint8_t *from = x + (channel + c) * plane + (long)top * columns + strip * SIDE;
            for (int i = 0; i < rows; i += 4) {  // what lies below the last row is not written
                const int32_t *sums = work.sums[slot] + (c * SIDE + i) * SIDE;
                const __m512i q = indices(sums, sums + 16, sums + 32, sums + 48, scale, offset);
                __m512i old;
                if (columns == SIDE) {
                    old = _mm512_loadu_si512(from + i * SIDE);
                } else {
                    old = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from + (long)i * columns)));
                    old = _mm512_inserti32x4(old, _mm_loadu_si128((const __m128i *)(from + (i + 1L) * columns)), 1);
                    old = _mm512_inserti32x4(old, _mm_loadu_si128((const __m128i *)(from + (i + 2L) * columns)), 2);
                    old = _mm512_inserti32x4(old, _mm_loadu_si128((const __m128i *)(from + (i + 3L) * columns)), 3);
                }
                lines[c][i / 4] = _mm512_subs_epu8(_mm512_adds_epu8(old, table[q]), lift);
            }
        }
        char *line = to + ((long)top * strips + strip) * bundle(dim) + channel * 16L;
        auto write = [&](int i, __m512i v) {
            if (i < rows) _mm512_storeu_si512(line + i * strips * bundle(dim), v);
        };
        for (int i = 0; i < rows; i += 4) {  // bytes of four channels side by side, a row of 16 columns to a line
            const __m512i a = lines[0][i / 4], b = lines[1][i / 4], c = lines[2][i / 4], d = lines[3][i / 4];
            const __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
            const __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
            const __m512i s = _mm512_unpacklo_epi16(ab, cd), t = _mm512_unpackhi_epi16(ab, cd);
            const __m512i u = _mm512_unpacklo_epi16(ab2, cd2), v = _mm512_unpackhi_epi16(ab2, cd2);
            const __m512i even = _mm512_shuffle_i32x4(s, t, 0x88), odd = _mm512_shuffle_i32x4(s, t, 0xdd);
            const __m512i even2 = _mm512_shuffle_i32x4(u, v, 0x88), odd2 = _mm512_shuffle_i32x4(u, v, 0xdd);
            write(i, _mm512_shuffle_i32x4(even, even2, 0x88));
            write(i + 1, _mm512_shuffle_i32x4(odd, odd2, 0x88));
            write(i + 2, _mm512_shuffle_i32x4(even, even2, 0xdd));
            write(i + 3, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
        }
    }

    void depthwise(const Block &block, int task, int threads, char *memory, Work &work) const {
        const auto [top, rows, first, last] = part(task, threads);
        configure(rows, TOGETHER * GROUPS);
        const uint8_t *x = activations(memory);
        const int items = (last - first) / 4 * strips;
        auto channel = [&, first = first](int i) { return first + i / strips * 4; };
        if (items) prepare(channel(0), 0, block, top, rows, x, 0, work);
        for (int i = 0; i < items; i++) {
            if (i + 1 < items) prepare(channel(i + 1), (i + 1) % strips, block, top, rows, x, (i + 1) % 2, work);
            multiply(i % 2, work);
            combine(channel(i), i % strips, block, i % 2, top, rows, x, panel(memory), work);
        }
    }

    // ---- pointwise --------------------------------------------------------------------------------------------------

    struct Ready {  // sums of 32 outputs at 64 positions, or at 32
        uint8_t *to;
        const int32_t *sums;
        int n;
        __mmask64 inside;
        void finish(int i, const Block &block, long plane) const {
            const Table table(block.tables[1] + (n + i) * 256L);
            const __m512 scale = _mm512_set1_ps(block.end.scale[n + i]), offset = _mm512_set1_ps(block.end.bias[n + i]);
            const int32_t *sum = sums + i * 32;
            const __m512i q = indices(sum, sum + 16, sum + 1024, sum + 1040, scale, offset);
            _mm512_mask_storeu_epi8(to + i * plane, inside, table[q]);
        }
    };

    void pointwise(const Block &block, int task, int threads, char *memory, Work &work) const {
        const char *weights = static_cast<const char *>(block.pointwise);
        const long group = dim * 16L;  // bytes of the weights of 16 outputs
        const auto [first, last, from, to] = share(task, threads);
        configure(SIDE, SIDE);
        const int rate = (16 * 1024 + group - 1) / group;  // rows per step: two multiplications finish 32
        Ready ready{};
        int turn = 0;
        for (int n = from; n < to; n += 32) {
            const char *a = weights + n / 16 * group, *ahead = a + 2 * group;
            for (int m = first; m < last; m += 2, turn = 1 - turn) {
                int row = 0;
                for (int part = 0; part < std::min(2, last - m); part++) {
                    const char *b = panel(memory) + 2 * (m + part) * bundle(dim);
                    int32_t *sums = work.sums[turn] + part * 1024;
                    clear();
                    for (long i = 0; i < group; i += TILE_BYTES, ahead += 128) {
                        _mm_prefetch(ahead, _MM_HINT_T1);
                        _mm_prefetch(ahead + 64, _MM_HINT_T1);
                        _tile_loadd(LEFT0, a + i, LINE);
                        _tile_loadd(RIGHT0, b + i, LINE);
                        _tile_loadd(RIGHT1, b + bundle(dim) + i, LINE);
                        _tile_loadd(LEFT1, a + group + i, LINE);
                        _tile_dpbsud(SUM0, LEFT0, RIGHT0);
                        _tile_dpbsud(SUM1, LEFT0, RIGHT1);
                        _tile_dpbsud(SUM2, LEFT1, RIGHT0);
                        _tile_dpbsud(SUM3, LEFT1, RIGHT1);
                        if (ready.to)
                            for (int j = 0; j < rate && row < 32; j++) ready.finish(row++, block, plane);
                    }
                    store_square(sums);
                }
                while (ready.to && row < 32) ready.finish(row++, block, plane);
                const __mmask64 inside = last - m > 1 ? ~0ull : 0xffffffffull;
                ready = {activations(memory) + n * plane + m * 32L, work.sums[turn], n, inside};
            }
        }
        if (ready.to)
            for (int row = 0; row < 32; row++) ready.finish(row, block, plane);
    }

    void finish(int image, int first, int last, char *memory) const {
        for (int c = first; c < last; c++) {
            const uint8_t *x = activations(memory) + c * plane;
            double total = 0;
            for (int y = 0; y < height; y++) {
                __m512i sum = _mm512_setzero_si512();
                for (int left = 0; left < width; left += SIDE) {
                    const __mmask16 here = width - left < SIDE ? (1u << (width - left)) - 1 : 0xffff;
                    const __m128i bytes = _mm_loadu_si128((const __m128i *)(x + (long)y * columns + left));
                    const __m512i v = _mm512_maskz_cvtepu8_epi32(here, bytes);
                    if (pooled)
                        sum = _mm512_add_epi32(sum, v);
                    else
                        _mm512_mask_storeu_ps(out + (((long)image * dim + c) * height + y) * width + left, here,
                                              _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(model.last[c])));
                }
                total += _mm512_reduce_add_epi32(sum);
            }
            if (pooled) out[(long)image * dim + c] = total / height / width * model.last[c];
        }
    }
};

}  // namespace

#endif
