// What the kernels for x86 CPUs share: the model as packing.py packs it, memory, bfloat16, activations.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define CONVMIXER_TILES  // the compiler knows AMX; whether the processor has it, tiles_permitted says
#endif

struct Affine {  // of an epilogue: scale * act(x + bias) + shift
    const float *bias, *scale, *shift;
};

struct Block {
    const void *kernel;        // of the depthwise convolution
    const float *bias, *gain;  // (dim)
    const void *pointwise;     // (dim, dim)
    Affine end;
    // For cpu_bytes.h: of both activations, (dim, 256); what stands for zero in x, and the lift of what is added to it, (dim).
    const uint8_t *tables[2], *zeros, *lifts;
};

// packing.py declares these records again, and packs what they point to.
struct Model {
    int32_t dim, depth, kernel_size, patch_size, in_chans, relu, stem_inputs, amx;
    const void *stem;
    Affine stem_end;
    const Block *blocks;
    const float *last;  // for cpu_bytes.h: the units of the last block's outputs, (dim)
};

namespace {

inline bool tiles_permitted() {  // on Linux a process has to ask once
#ifdef CONVMIXER_TILES
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool permitted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return permitted;
#else
    return false;
#endif
}

inline long cache() {  // of a core, the second level
    static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 1 << 20;
}

constexpr size_t HUGE_PAGE = 1 << 21;  // a page that the processor finds at once

struct Buffer {  // memory of one thread, kept between calls
    char *data = nullptr;
    size_t size = 0;
    char *take(size_t bytes) {  // null where there is none: nothing may be thrown within OpenMP
        if (bytes > size) {
            std::free(data);
            size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            data = static_cast<char *>(std::aligned_alloc(HUGE_PAGE, size));
            if (data == nullptr)
                size = 0;
            else
                madvise(data, size, MADV_HUGEPAGE);  // where there are none, that changes nothing
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};

struct Pair {
    __m512 a, b;
};

inline Pair load(const float *p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
inline Pair load(const uint16_t *p) {
    __m512i v = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)))};
}

inline __m512i rounded(__m512 x) {  // to the nearest bfloat16, in the upper half of each lane
    __m512i i = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
inline void store(float *p, Pair v) {
    _mm512_storeu_ps(p, v.a);
    _mm512_storeu_ps(p + 16, v.b);
}
inline void store(uint16_t *p, Pair v) {
#ifdef __AVX512BF16__
    __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.a));
    __m512i odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.b)), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(even, odd));
#else
    __m512i even = _mm512_srli_epi32(rounded(v.a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(v.b)));
#endif
}
// 32 channels in their own order, as a matrix multiplication leaves them.
inline void store_ordered(float *p, __m512 a, __m512 b) { store(p, Pair{a, b}); }
inline void store_ordered(uint16_t *p, __m512 a, __m512 b) {
#ifdef __AVX512BF16__
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16)));
    _mm256_storeu_si256((__m256i *)(p + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(b), 16)));
#endif
}

inline uint16_t to_bf16(float x) {
    if (x != x) return 0x7fc0;
    uint32_t i;
    std::memcpy(&i, &x, 4);
    return (i + 0x7fff + ((i >> 16) & 1)) >> 16;
}
inline void assign(float &to, float x) { to = x; }
inline void assign(uint16_t &to, float x) { to = to_bf16(x); }

template <int N>
inline __m512 polynomial(const float (&terms)[N], __m512 x) {  // highest power first
    __m512 sum = _mm512_set1_ps(terms[0]);
#pragma GCC unroll 16
    for (int i = 1; i < N; i++) sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(terms[i]));
    return sum;
}

inline __m512 clamped(__m512 x) { return _mm512_range_ps(x, _mm512_set1_ps(4.0f), 2); }  // to [-4, 4]

// Phi(x), the normal distribution. For float32 erf by a rational function; for bfloat16 by a polynomial.
inline __m512 normal(__m512 x, const float *) {
    static const float top[] = {
        -2.72614226e-10f, 2.77068142e-08f, -2.10102402e-06f, -5.69250639e-05f, -0.00073499063f, -0.00295459981f,
        -0.0160960333f};
    static const float bottom[] = {
        -1.45660718e-05f, -0.000213374055f, -0.00168282697f, -0.00737332917f, -0.0142647391f};
    const __m512 z = clamped(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
    const __m512 t = _mm512_mul_ps(z, z), half = _mm512_set1_ps(0.5f);
    const __m512 divisor = polynomial(bottom, t);
    __m512 inverse = _mm512_rcp14_ps(divisor);  // a step of Newton's, as a division takes as long as all the rest
    inverse = _mm512_fnmadd_ps(_mm512_fmsub_ps(divisor, inverse, _mm512_set1_ps(1.0f)), inverse, inverse);
    const __m512 erf = _mm512_mul_ps(_mm512_mul_ps(z, polynomial(top, t)), inverse);
    return _mm512_fmadd_ps(half, erf, half);
}
inline __m512 normal(__m512 x, const uint16_t *) {
    // x * Phi(x) within 2e-4, a tenth of what bfloat16 can tell apart near 1; beyond 4 within 3e-7 * |x| of 0 or x.
    static const float terms[] = {
        2.25881193e-08f, -1.58882197e-06f, 4.77637685e-05f, -0.000812186124f, 0.00876368304f, -0.0645543902f,
        0.397870246f};
    const __m512 z = clamped(x);
    return _mm512_fmadd_ps(z, polynomial(terms, _mm512_mul_ps(z, z)), _mm512_set1_ps(0.5f));
}

template <typename T>
inline __m512 activate(__m512 x, bool relu) {
    return relu ? _mm512_max_ps(_mm512_setzero_ps(), x) : _mm512_mul_ps(x, normal(x, static_cast<const T *>(nullptr)));
}

}  // namespace
