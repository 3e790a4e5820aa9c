// A folded ConvMixer on x86 CPUs with AVX-512, block by block in the cache, in float32 or bfloat16; for bfloat16 on AMX
// see cpu_tiles.h.
//
// Activations lie channels-last with a border of zeros, (H + k - 1, W + k - 1 + extra, dim), in two buffers per image
// that take turns. A block of the model is computed 32 positions at a time: the depthwise convolution, its activation
// and the residual go to a panel (32, dim) in the first-level cache, which the 1x1 convolution reads at once. So each
// activation is read and written once per block, and the weights of a small model stay in the second-level cache.
//
// In registers bfloat16 channels are float32, even channels in one register and odd ones in another: that is one shift
// and one mask. Sums are float32 throughout; values are rounded to bfloat16 where they are stored.
//
// AMX multiplies only bfloat16, but a float32 is the exact sum of three bfloat16, and six of the nine products of two
// such sums hold all that float32 keeps: still more than twice as fast as multiplying float32.

#include "cpu.h"

#include <unistd.h>

#include "cpu_bytes.h"

namespace {

constexpr int ROWS = 32;    // positions computed together
constexpr int PANEL = 64;   // output channels of one panel of packed weights
constexpr int EXTRA = 8;    // columns of zeros that the last strip of a row may read

// ---- depthwise ------------------------------------------------------------------------------------------------------

// WIDTH neighbours of a row, 32 channels: y + gain * act(depthwise(y)). `in` is the upper left corner of the window.
template <typename T, int K, int WIDTH>
inline void strip(const T *in, long row, long dim, int k, const float *kernel, const float *bias, const float *gain,
                  bool relu, T *out, int count) {
    __m512 a[WIDTH], b[WIDTH];
    for (int i = 0; i < WIDTH; i++) a[i] = _mm512_loadu_ps(bias), b[i] = _mm512_loadu_ps(bias + 16);
    const int side = K ? K : k;
    for (int y = 0; y < side; y++) {
        const T *line = in + y * row;
        const float *w = kernel + y * side * 32;
        if constexpr (K > 0) {
#pragma GCC unroll 32
            for (int x = 0; x < WIDTH + K - 1; x++) {
                Pair v = load(line + x * dim);
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; i++) {
                    if (x - i >= 0 && x - i < K) {
                        a[i] = _mm512_fmadd_ps(v.a, _mm512_loadu_ps(w + (x - i) * 32), a[i]);
                        b[i] = _mm512_fmadd_ps(v.b, _mm512_loadu_ps(w + (x - i) * 32 + 16), b[i]);
                    }
                }
            }
        } else {
            for (int x = 0; x < side; x++) {
                __m512 wa = _mm512_loadu_ps(w + x * 32), wb = _mm512_loadu_ps(w + x * 32 + 16);
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; i++) {
                    Pair v = load(line + (x + i) * dim);
                    a[i] = _mm512_fmadd_ps(v.a, wa, a[i]);
                    b[i] = _mm512_fmadd_ps(v.b, wb, b[i]);
                }
            }
        }
    }
    const int before = (side - 1) / 2;
    const T *centre = in + before * (row + dim);
    __m512 ga = _mm512_loadu_ps(gain), gb = _mm512_loadu_ps(gain + 16);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        if (i < count) {
            Pair y = load(centre + i * dim);
            store(out + i * dim, Pair{_mm512_fmadd_ps(ga, activate<T>(a[i], relu), y.a),
                                      _mm512_fmadd_ps(gb, activate<T>(b[i], relu), y.b)});
        }
    }
}

template <typename T, int K>
void depthwise(const T *in, long row, int width, int dim, int k, const Block &block, bool relu, int first, int last,
               T *out) {
    const int side = K ? K : k;
    constexpr int WIDE = 8;
    for (int c = 0; c < dim; c += 32) {
        const float *kernel = static_cast<const float *>(block.kernel) + (long)c * side * side;
        for (int m = first; m < last;) {
            const int y = m / width, x = m % width, left = std::min(width - x, last - m);
            const T *corner = in + y * row + (long)x * dim + c;
            T *to = out + (long)(m - first) * dim + c;
            if (left > 4) {
                strip<T, K, WIDE>(corner, row, dim, k, kernel, block.bias + c, block.gain + c, relu, to, left);
                m += std::min(left, WIDE);
            } else {
                strip<T, K, 4>(corner, row, dim, k, kernel, block.bias + c, block.gain + c, relu, to, left);
                m += left;
            }
        }
    }
}

// ---- matrix multiplication ------------------------------------------------------------------------------------------

// Where results are stored: position m of the image, inside the border.
template <typename T>
struct Target {
    T *origin;  // of position 0
    long row;
    int width, dim;
    bool relu;  // the activation of the results, else GELU
    T *at(int m) const { return origin + (m / width) * row + (long)(m % width) * dim; }
};

template <typename T>
inline void finish(__m512 a, __m512 b, const Affine &end, int n, bool relu, T *to) {
    a = activate<T>(_mm512_add_ps(a, _mm512_loadu_ps(end.bias + n)), relu);
    b = activate<T>(_mm512_add_ps(b, _mm512_loadu_ps(end.bias + n + 16)), relu);
    a = _mm512_fmadd_ps(a, _mm512_loadu_ps(end.scale + n), _mm512_loadu_ps(end.shift + n));
    b = _mm512_fmadd_ps(b, _mm512_loadu_ps(end.scale + n + 16), _mm512_loadu_ps(end.shift + n + 16));
    store_ordered(to, a, b);
}

inline __m512 multiply(__m512 sum, const float *a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*a), _mm512_castsi512_ps(b), sum);
}
inline __m512 multiply(__m512 sum, const uint16_t *a, __m512i b) {  // two inputs
    int32_t both;
    std::memcpy(&both, a, 4);
    __m512i x = _mm512_set1_epi32(both);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}

template <typename T, int R>
inline void few_rows(const T *a, int inputs, const char *panel, const Affine &end, int n, const Target<T> &to, int m) {
    constexpr int STEP = 4 / sizeof(T);  // inputs in one lane
    __m512 sum[R][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int i = 0; i < inputs; i += STEP) {
        __m512i b[4];
        for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(panel + (i / STEP) * (PANEL * 4) + j * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[r][j] = multiply(sum[r][j], a + (long)r * inputs + i, b[j]);
    }
    for (int r = 0; r < R; r++) {
        T *result = to.at(m + r) + n;
        finish<T>(sum[r][0], sum[r][1], end, n, to.relu, result);
        finish<T>(sum[r][2], sum[r][3], end, n + 32, to.relu, result + 32);
    }
}

#ifdef CONVMIXER_TILES
// Write float32 as sums of three bfloat16, the largest first, in tiles: (ROWS, inputs) -> (inputs / 32, 3, 2, 16, 32).
inline void split(const float *a, int inputs, int rows, uint16_t *parts) {
    auto float32 = [](__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); };
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < inputs; i += 32) {
            __m512 low = _mm512_loadu_ps(a + (long)r * inputs + i), up = _mm512_loadu_ps(a + (long)r * inputs + i + 16);
            uint16_t *to = parts + (i / 32) * 3072L + r * 32;
            for (int part = 0; part < 3; part++, to += 1024) {
                const __m512i nearest = (__m512i)_mm512_cvtne2ps_pbh(up, low);
                _mm512_storeu_si512(to, nearest);
                low = _mm512_sub_ps(low, float32(_mm512_castsi512_si256(nearest)));
                up = _mm512_sub_ps(up, float32(_mm512_extracti64x4_epi64(nearest, 1)));
            }
        }
    }
}

// `weights` (outputs / 32, inputs / 32, 3, 2, 16, 16, 2): for each part the tiles of 16 outputs and 16 pairs of inputs.
void multiply_split(const uint16_t *parts, int inputs, const char *weights, int outputs, const Affine &end,
                   const Target<float> &to, int first, int last) {
    alignas(64) float sums[2][ROWS * 32];
    const int rate = (ROWS * 32 + inputs - 1) / inputs;
    settle();
    for (int n = 0; n <= outputs; n += 32) {
        // The sums of the previous outputs are finished between the multiplications of these.
        const float *ready = sums[n / 32 % 2];
        int row = first;
        auto finish_row = [&] {
            const float *sum = ready + (row - first) * 32;
            finish<float>(_mm512_load_ps(sum), _mm512_load_ps(sum + 16), end, n - 32, to.relu, to.at(row) + n - 32);
            row++;
        };
        if (n == outputs) {
            while (row < last) finish_row();
            return;
        }
        if (n == 0) row = last;
        const char *a = reinterpret_cast<const char *>(parts);
        auto left = [&](int part) {
            _tile_loadd(4, a + part * 2048, 64);
            _tile_loadd(5, a + part * 2048 + 1024, 64);
        };
        auto right = [&](int part) {
            _tile_loadd(6, weights + part * 2048, 64);
            _tile_loadd(7, weights + part * 2048 + 1024, 64);
        };
        auto multiply = [] {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        };
        clear();
        for (int i = 0; i < inputs; i += 32, weights += 6144, a += 6144) {
            left(2), right(0), multiply();
            left(1), multiply();
            right(1), multiply();
            left(0), multiply();
            right(2), multiply();
            right(0), multiply();
            for (int j = 0; j < rate && row < last; j++) finish_row();
        }
        float *sum = sums[(n / 32 + 1) % 2];
        store_square(sum);
    }
}
#endif

// act(a @ weights + bias) * scale + shift for positions [first, last), of which `a` (ROWS, inputs) holds the inputs.
template <typename T>
void multiply_panel(const T *a, int inputs, const void *weights, int outputs, const Affine &end, const Target<T> &to,
             int first, int last, [[maybe_unused]] bool amx, [[maybe_unused]] uint16_t *parts) {
    const char *packed = static_cast<const char *>(weights);
#ifdef CONVMIXER_TILES
    if constexpr (sizeof(T) == 4)
        if (amx) {
            split(a, inputs, last - first, parts);
            return multiply_split(parts, inputs, packed, outputs, end, to, first, last);
        }
#endif
    const long panel_bytes = (long)inputs * PANEL * sizeof(T);
    for (int n = 0; n < outputs; n += PANEL, packed += panel_bytes) {
        int m = first;
        for (; m + 6 <= last; m += 6) few_rows<T, 6>(a + (long)(m - first) * inputs, inputs, packed, end, n, to, m);
        for (; m + 2 <= last; m += 2) few_rows<T, 2>(a + (long)(m - first) * inputs, inputs, packed, end, n, to, m);
        for (; m < last; m++) few_rows<T, 1>(a + (long)(m - first) * inputs, inputs, packed, end, n, to, m);
    }
}

// ---- the model ------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardPass {
    const Model &model;
    const float *images;  // (B, in_chans, H, W)
    int image_height, image_width;
    float *out;  // (B, dim) means, or (B, h, w, dim)
    bool pooled;
    int height, width, k, dim, positions, tasks;
    long row, buffer_size;

    ForwardPass(const Model &m, const float *x, int h, int w, float *o, bool p)
        : model(m), images(x), image_height(h), image_width(w), out(o), pooled(p) {
        height = h / m.patch_size, width = w / m.patch_size, k = m.kernel_size, dim = m.dim;
        positions = height * width, tasks = (positions + ROWS - 1) / ROWS;
        row = (long)(width + k - 1 + EXTRA) * dim;
        buffer_size = (height + k - 1) * row + EXTRA * dim;
    }

    Target<T> interior(T *buffer) const {
        const int before = (k - 1) / 2;
        return {buffer + before * (row + dim), row, width, dim, model.relu != 0};
    }

    void stem(int image, int task, T *panel, T *to) const {
        const int p = model.patch_size, inputs = model.stem_inputs;
        const int first = task * ROWS, last = std::min(first + ROWS, positions);
        const float *pixels = images + (long)image * model.in_chans * image_height * image_width;
        for (int m = first; m < last; m++) {
            T *line = panel + (long)(m - first) * inputs;
            const float *corner = pixels + (long)(m / width) * p * image_width + (m % width) * p;
            int i = 0;
            for (int c = 0; c < model.in_chans; c++)
                for (int y = 0; y < p; y++)
                    for (int x = 0; x < p; x++)
                        assign(line[i++], corner[((long)c * image_height + y) * image_width + x]);
            for (; i < inputs; i++) line[i] = 0;
        }
        multiply_panel<T>(panel, inputs, model.stem, dim, model.stem_end, interior(to), first, last, model.amx,
                          parts(panel));
    }

    void block(const Block &b, int task, const T *from, T *panel, T *to) const {
        const int first = task * ROWS, last = std::min(first + ROWS, positions);
        switch (k) {
            case 3: depthwise<T, 3>(from, row, width, dim, k, b, model.relu, first, last, panel); break;
            case 5: depthwise<T, 5>(from, row, width, dim, k, b, model.relu, first, last, panel); break;
            case 7: depthwise<T, 7>(from, row, width, dim, k, b, model.relu, first, last, panel); break;
            case 9: depthwise<T, 9>(from, row, width, dim, k, b, model.relu, first, last, panel); break;
            default: depthwise<T, 0>(from, row, width, dim, k, b, model.relu, first, last, panel);
        }
        multiply_panel<T>(panel, dim, b.pointwise, dim, b.end, interior(to), first, last, model.amx, parts(panel));
    }

    void finish_image(int image, T *from, int first_channel, int last_channel) const {
        const Target<T> at = interior(from);
        const __m512 share = _mm512_set1_ps(1.0f / positions);
        alignas(64) float values[32];
        for (int c = first_channel; c < last_channel; c += 32) {
            Pair total{_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int m = 0; m < positions;) {
                Pair sum{_mm512_setzero_ps(), _mm512_setzero_ps()};  // of some positions: sums of sums are more exact
                for (const int end = std::min(m + 256, positions); m < end; m++) {
                    Pair v = load(at.at(m) + c);
                    if (pooled) {
                        sum.a = _mm512_add_ps(sum.a, v.a), sum.b = _mm512_add_ps(sum.b, v.b);
                    } else {
                        ordered(v, values);
                        std::memcpy(out + ((long)image * positions + m) * dim + c, values, sizeof values);
                    }
                }
                total.a = _mm512_add_ps(total.a, sum.a), total.b = _mm512_add_ps(total.b, sum.b);
            }
            if (pooled) {
                ordered(Pair{_mm512_mul_ps(total.a, share), _mm512_mul_ps(total.b, share)}, values);
                std::memcpy(out + (long)image * dim + c, values, sizeof values);
            }
        }
    }

    static void ordered(Pair v, float *to) {
        if (sizeof(T) == 4) return store(to, v);
        const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        _mm512_store_ps(to, _mm512_permutex2var_ps(v.a, low, v.b));
        _mm512_store_ps(to + 16, _mm512_permutex2var_ps(v.a, high, v.b));
    }

    long panel_size() const { return (long)ROWS * std::max(dim, (int)model.stem_inputs); }
    uint16_t *parts(T *panel) const { return reinterpret_cast<uint16_t *>(panel + panel_size()); }

    // Take two buffers of activations, with their borders zeroed. False: there is no memory.
    bool activations(Buffer &memory, T *&one, T *&two) const {
        const long bytes = (buffer_size * sizeof(T) + 63) / 64 * 64;
        char *data = memory.take(2 * bytes);
        if (data == nullptr) return false;
        std::memset(data, 0, 2 * bytes);
        one = reinterpret_cast<T *>(data), two = reinterpret_cast<T *>(data + bytes);
        return true;
    }
    // Take a panel, and with AMX the parts of its float32 values.
    T *panel(Buffer &memory) const {
        return reinterpret_cast<T *>(memory.take(panel_size() * (sizeof(T) + (model.amx ? 6 : 0))));
    }

    void begin_thread() const {
#ifdef CONVMIXER_TILES
        if (model.amx) configure(16, 16);
#endif
    }
    void end_thread() const {
#ifdef CONVMIXER_TILES
        if (model.amx) _tile_release();
#endif
    }
};

thread_local Buffer own_memory, own_panel;

// Compute a batch. False: there was no memory.
template <typename T>
bool forward(const Model &model, const float *images, int batch, int height, int width, float *out, bool pooled,
             int threads) {
    const ForwardPass<T> pass(model, images, height, width, out, pooled);
    // Threads share images that do not fit a core's cache, if there is enough to share.
    const bool fits = 2 * pass.buffer_size * (long)sizeof(T) <= cache() || pass.tasks < 8 * threads;
    const int unshared = fits ? batch / threads * threads : 0;  // images that one thread computes
    T *shared_one = nullptr, *shared_two = nullptr;
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        T *one = nullptr, *two = nullptr, *panel = pass.panel(own_panel);
        const bool first = omp_get_thread_num() == 0;
        if (panel == nullptr || ((unshared || first) && !pass.activations(own_memory, one, two))) {
#pragma omp atomic write
            failed = true;
        }
        if (first) shared_one = one, shared_two = two;
#pragma omp barrier
        if (!failed) {
            pass.begin_thread();
#pragma omp for schedule(dynamic) nowait
            for (int image = 0; image < unshared; image++) {
                T *from = one, *to = two;
                for (int task = 0; task < pass.tasks; task++) pass.stem(image, task, panel, from);
                for (int b = 0; b < model.depth; b++, std::swap(from, to))
                    for (int task = 0; task < pass.tasks; task++) pass.block(model.blocks[b], task, from, panel, to);
                pass.finish_image(image, from, 0, model.dim);
            }
            if (unshared && unshared < batch) {
#pragma omp barrier
            }
            for (int image = unshared; image < batch; image++) {  // all threads share what is left over
                T *from = shared_one, *to = shared_two;
#pragma omp for schedule(static)
                for (int task = 0; task < pass.tasks; task++) pass.stem(image, task, panel, from);
                for (int b = 0; b < model.depth; b++, std::swap(from, to)) {
#pragma omp for schedule(static)
                    for (int task = 0; task < pass.tasks; task++) pass.block(model.blocks[b], task, from, panel, to);
                }
#pragma omp for schedule(static)
                for (int c = 0; c < model.dim; c += 32) pass.finish_image(image, from, c, c + 32);
            }
            pass.end_thread();
        }
    }
    return !failed;
}

}  // namespace

extern "C" {

// In bytes; Python compares them with those of its own records.
extern const int32_t convmixer_record_sizes[3];
const int32_t convmixer_record_sizes[3] = {sizeof(Affine), sizeof(Block), sizeof(Model)};

int convmixer_amx() { return tiles_permitted(); }

// Each returns 0 where there was too little memory, else 1.
int convmixer_float32(const Model *model, const float *images, int batch, int height, int width, float *out, int pooled,
                      int threads) {
    return forward<float>(*model, images, batch, height, width, out, pooled, threads);
}

int convmixer_bfloat16(const Model *model, const float *images, int batch, int height, int width, float *out,
                       int pooled, int threads) {
#ifdef CONVMIXER_TILES
    if (model->amx && model->relu) return Tiles<true>(*model, images, height, width, out, pooled).forward(batch, threads);
    if (model->amx) return Tiles<false>(*model, images, height, width, out, pooled).forward(batch, threads);
#endif
    return forward<uint16_t>(*model, images, batch, height, width, out, pooled, threads);
}

#ifdef CONVMIXER_BYTES
int convmixer_int8(const Model *model, const float *images, int batch, int height, int width, float *out, int pooled,
                   int threads) {
    auto forward = [&](auto engine) { return engine.forward(batch, threads); };
    const int k = model->kernel_size;
    if (k < 2) return forward(Bytes<4>(*model, images, height, width, out, pooled));
    if (k < 6) return forward(Bytes<5>(*model, images, height, width, out, pooled));
    if (k < 10) return forward(Bytes<6>(*model, images, height, width, out, pooled));
    return forward(Bytes<7>(*model, images, height, width, out, pooled));
}
#endif
}
