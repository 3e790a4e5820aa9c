// A folded ConvMixer in bfloat16 on AMX: both convolutions of a block multiply tiles, with float32 sums.
//
// Activations are planar, (dim, positions), each row of the image filled up to `columns`, a multiple of 16. A block has
// two phases, and x is overwritten in the second:
//
//   depthwise  For 16 columns of up to 16 rows of one channel, each row of the kernel is a matrix multiplication:
//              (rows, neighbours) of x times a Toeplitz matrix (neighbours, 16) that holds the row of the kernel once
//              per column. With activation and residual it goes to a panel of positions,
//              (positions / 16, dim / 2, 16, 2).
//   pointwise  weights (outputs, inputs) times panel (inputs, positions), activation, scale and shift, into x.
//
// The neighbours of 16 columns are copied to rows of one cache line first, since tiles load far slower from elsewhere.
// A Toeplitz matrix is a run of zeros with the row of the kernel in their midst, read with a stride of minus two columns.

#pragma once

#include "cpu.h"

namespace {

constexpr int SIDE = 16;     // columns of a tile, and at most as many rows
constexpr int LARGEST = 15;  // kernel size

}  // namespace

#ifdef CONVMIXER_TILES

namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Call this after writing to memory and before loading tiles: gcc does not know that these read it.
inline void settle() { asm volatile("" ::: "memory"); }

// The tiles: sums += left * right. Macros, because gcc pastes these numbers into the instructions.
#define SUM0 0
#define SUM1 1
#define SUM2 2
#define SUM3 3
#define LEFT0 4
#define LEFT1 5
#define RIGHT0 6
#define RIGHT1 7

constexpr int LINE = 64;                 // bytes of a row of a tile, and of a cache line
constexpr int TILE_BYTES = SIDE * LINE;
constexpr int BACK = -8;                 // bytes from a row of a Toeplitz matrix to the next, in its run

// `inner` groups of four bytes are multiplied.
inline void configure(int height, int inner) {
    TileConfig config;
    for (int i = SUM0; i <= RIGHT1; i++) {
        config.bytes[i] = i == LEFT0 || i == LEFT1 ? inner * 4 : LINE;
        config.rows[i] = i < RIGHT0 ? height : inner;
    }
    asm volatile("" ::"r"(&config) : "memory");  // as in settle(); all of it is read
    _tile_loadconfig(&config);
}

// The four sums.
inline void clear() {
    _tile_zero(SUM0);
    _tile_zero(SUM1);
    _tile_zero(SUM2);
    _tile_zero(SUM3);
}
// One after the other, (4, 16, 16).
inline void store_each(void *sums) {
    char *to = static_cast<char *>(sums);
    _tile_stored(SUM0, to, LINE);
    _tile_stored(SUM1, to + TILE_BYTES, LINE);
    _tile_stored(SUM2, to + 2 * TILE_BYTES, LINE);
    _tile_stored(SUM3, to + 3 * TILE_BYTES, LINE);
}
// As the quarters of a square, (32, 32).
inline void store_square(void *sums) {
    char *to = static_cast<char *>(sums);
    _tile_stored(SUM0, to, 2 * LINE);
    _tile_stored(SUM1, to + LINE, 2 * LINE);
    _tile_stored(SUM2, to + 2 * TILE_BYTES, 2 * LINE);
    _tile_stored(SUM3, to + 2 * TILE_BYTES + LINE, 2 * LINE);
}

constexpr int RUN = 3 * SIDE; // pairs of values in the run that holds a Toeplitz matrix
constexpr int AHEAD = 32;     // values before the activations, which masked loads may begin at

// What the engines on tiles share: the layout of activations, and how threads share images.
class Planar {
  protected:
    const Model &model;
    const float *images;  // (B, in_chans, H, W)
    int image_height, image_width;
    float *out;  // (B, dim) means, or (B, dim, h, w)
    bool pooled;
    int k, dim, before, height, width, columns, strips, positions;

    Planar(const Model &m, const float *x, int h, int w, float *o, bool p)
        : model(m), images(x), image_height(h), image_width(w), out(o), pooled(p), k(m.kernel_size), dim(m.dim) {
        before = (k - 1) / 2;
        height = h / m.patch_size, width = w / m.patch_size;
        strips = (width + SIDE - 1) / SIDE, columns = strips * SIDE;
        positions = (height * columns + 31) / 32 * 32;
    }

    // Bytes of 16 positions in the panel, of `each` bytes. One line more: they must not lie a power of two apart.
    static long bundle(long each) { return SIDE * each + 64; }

    // Rows of the image are divided into bands; the bands' channels, where there are more threads than bands, as well.
    int bands() const { return (height + SIDE - 1) / SIDE; }
    int tasks(int threads) const { return bands() * ((threads + bands() - 1) / bands()); }

    struct Part {  // of a block's depthwise convolution
        int top, rows, first, last;
    };
    Part part(int task, int threads) const {
        const int n = bands(), parts = tasks(threads) / n, band = task / parts, i = task % parts;
        const int top = (long)height * band / n, below = (long)height * (band + 1) / n;
        return {top, below - top, dim / 4 * i / parts * 4, dim / 4 * (i + 1) / parts * 4};
    }

    struct Share {  // of a 1x1 convolution: positions in pairs of 16, outputs
        int first, last, begin, end;
    };
    int shares(int threads) const {  // how many there are
        const int parts = std::min(threads, positions / 32);
        return parts * ((threads + parts - 1) / parts);
    }
    Share share(int task, int threads) const {
        const int pairs = positions / 32, parts = std::min(threads, pairs), parts_of_outputs = shares(threads) / parts;
        const int i = task % parts, j = task / parts;
        return {(int)((long)pairs * i / parts), (int)((long)pairs * (i + 1) / parts), dim / 32 * j / parts_of_outputs * 32,
                dim / 32 * (j + 1) / parts_of_outputs * 32};
    }

    // Neighbours -before to 31 - before of a strip that lie in the image.
    __mmask32 inside(int strip) const {
        const int left = strip * SIDE - before, from = std::max(0, -left), to = std::min(32, width - left);
        return (to == 32 ? ~0u : (1u << to) - 1) & ~0u << from;
    }

    // The patches, in bfloat16, as the panel of the patch embedding.
    void fill(int image, int task, int threads, char *panel) const {
        const int p = model.patch_size, inputs = model.stem_inputs, n = tasks(threads), bundles = positions / SIDE;
        const float *pixels = images + (long)image * model.in_chans * image_height * image_width;
        for (int i = (long)bundles * task / n; i < (long)bundles * (task + 1) / n; i++) {
            char *to = panel + i * bundle(inputs * 2);
            std::memset(to, 0, inputs * 32);
            const int y = i / strips, left = i % strips * SIDE;
            if (y >= height) continue;
            for (int m = 0; m < std::min(SIDE, width - left); m++) {
                const float *corner = pixels + (long)y * p * image_width + (left + m) * p;
                int j = 0;
                for (int c = 0; c < model.in_chans; c++)
                    for (int v = 0; v < p; v++)
                        for (int u = 0; u < p; u++, j++)
                            reinterpret_cast<uint16_t *>(to)[j / 2 * 32 + m * 2 + j % 2] =
                                to_bf16(corner[((long)c * image_height + v) * image_width + u]);
            }
        }
    }

    // An engine has bytes(), panel(memory), work of a thread, and the steps of an image. False: there was no memory.
    template <class Engine>
    static bool run(const Engine &engine, int batch, int threads) {
        const Model &model = engine.model;
        // Threads share images that do not fit a core's cache, if there is a tile for each of them.
        const bool fits = engine.bytes() <= cache() || engine.bands() * engine.strips < threads;
        const int unshared = fits ? batch / threads * threads : 0;  // images that one thread computes
        char *shared = nullptr;
        bool failed = false;
#pragma omp parallel num_threads(threads)
        {
            thread_local Buffer memory;
            typename Engine::Work work;
            const bool first = omp_get_thread_num() == 0;
            char *own = unshared || first ? memory.take(engine.bytes()) : nullptr;
            if (own == nullptr && (unshared || first)) {
#pragma omp atomic write
                failed = true;
            }
            if (first) shared = own;  // always the same memory, of which each core has its part in its cache
#pragma omp barrier
            if (!failed) {
#pragma omp for schedule(dynamic) nowait
                for (int image = 0; image < unshared; image++) {
                    for (int task = 0; task < engine.tasks(1); task++) engine.fill(image, task, 1, engine.panel(own));
                    engine.embed(0, 1, own, work);
                    for (int b = 0; b < model.depth; b++) {
                        for (int task = 0; task < engine.tasks(1); task++)
                            engine.depthwise(model.blocks[b], task, 1, own, work);
                        engine.pointwise(model.blocks[b], 0, 1, own, work);
                    }
                    engine.finish(image, 0, model.dim, own);
                }
                if (unshared && unshared < batch) {
#pragma omp barrier
                }
                for (int image = unshared; image < batch; image++) {  // all threads share what is left over
#pragma omp for schedule(static)
                    for (int task = 0; task < engine.tasks(threads); task++)
                        engine.fill(image, task, threads, engine.panel(shared));
#pragma omp for schedule(static)
                    for (int task = 0; task < engine.shares(threads); task++)
                        engine.embed(task, threads, shared, work);
                    for (int b = 0; b < model.depth; b++) {
#pragma omp for schedule(static)
                        for (int task = 0; task < engine.tasks(threads); task++)
                            engine.depthwise(model.blocks[b], task, threads, shared, work);
#pragma omp for schedule(static)
                        for (int task = 0; task < engine.shares(threads); task++)
                            engine.pointwise(model.blocks[b], task, threads, shared, work);
                    }
#pragma omp for schedule(static)
                    for (int c = 0; c < model.dim; c += 32) engine.finish(image, c, c + 32, shared);
                }
                _tile_release();
            }
        }
        return !failed;
    }
};

// Multiply the weights of 32 outputs with 32 positions, four tiles of 16 x 16 x 32 (bfloat16) at a time.
inline void multiply_bfloat16(const char *a, long group, const char *b, long next, float *sums) {
    settle();
    clear();
    for (long i = 0; i < group; i += TILE_BYTES) {
        _tile_loadd(LEFT0, a + i, LINE);
        _tile_loadd(RIGHT0, b + i, LINE);
        _tile_loadd(RIGHT1, b + next + i, LINE);
        _tile_loadd(LEFT1, a + group + i, LINE);
        _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
        _tile_dpbf16ps(SUM1, LEFT0, RIGHT1);
        _tile_dpbf16ps(SUM2, LEFT1, RIGHT0);
        _tile_dpbf16ps(SUM3, LEFT1, RIGHT1);
    }
    store_square(sums);
}

template <bool RELU>
class Tiles : Planar {
    friend Planar;
    struct Work {  // of a thread
        alignas(64) uint16_t windows[2][4][(SIDE + LARGEST - 1) * 32] = {};
        alignas(64) uint32_t runs[2][4][LARGEST * RUN] = {};
        alignas(64) float sums[2][4 * SIDE * SIDE];
    };
    struct Item {  // four sums: channels x neighbouring strips of 16 columns
        int channel, strip;
        bool wide;  // 2 x 2, else 4 x 1
    };
    long plane;  // values from channel to channel, which must not lie a power of two apart

  public:
    Tiles(const Model &m, const float *x, int h, int w, float *o, bool p)
        : Planar(m, x, h, w, o, p), plane(positions + 32) {}

    bool forward(int batch, int threads) const { return run(*this, batch, threads); }

  private:
    long bytes_x() const { return (AHEAD + dim * plane) * 2; }
    long bytes() const { return bytes_x() + positions / SIDE * bundle(2 * std::max(dim, (int)model.stem_inputs)); }
    static uint16_t *activations(char *memory) { return reinterpret_cast<uint16_t *>(memory) + AHEAD; }
    char *panel(char *memory) const { return memory + bytes_x(); }

    // ---- depthwise --------------------------------------------------------------------------------------------------

    // What four sums need: neighbours, (rows + k - 1, 32) each, and for each channel a run for each row of the kernel.
    void prepare(const Item &item, const Block &block, int top, int rows, const uint16_t *x, int slot, Work &work) const {
        for (int a = 0; a < 4; a++) {
            const int channel = item.channel + (item.wide ? a / 2 : a), strip = item.strip + (item.wide ? a % 2 : 0);
            const uint16_t *line = x + channel * plane + strip * SIDE - before;
            uint16_t *window = work.windows[slot][a];
            const __mmask32 columns_inside = inside(strip);
            for (int i = 0, y = top - before; i < rows + k - 1; i++, y++) {
                const bool real = y >= 0 && y < height;
                _mm512_store_si512(window + i * 32,
                                   _mm512_maskz_loadu_epi16(real ? columns_inside : 0, real ? line + (long)y * columns : x));
            }
        }
        const uint16_t *kernel = static_cast<const uint16_t *>(block.kernel) + (long)item.channel * k * SIDE;
        for (int c = 0; c < (item.wide ? 2 : 4); c++) {
            uint32_t *run = work.runs[slot][c] + RUN - 1 - SIDE - k;
            for (int y = 0; y < k; y++, kernel += SIDE, run += RUN) {  // reversed; pairs of neighbours, one after the other
                const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)kernel));
                const __m512i next = _mm512_maskz_expand_epi32(0xfffe, w);
                _mm512_storeu_si512(run, _mm512_or_si512(w, _mm512_slli_epi32(next, 16)));
            }
        }
    }

    void multiply(const Item &item, int slot, Work &work) const {
        const auto *windows = work.windows[slot];
        const uint32_t *run = work.runs[slot][0] + RUN - 2 - SIDE;
        settle();
        clear();
        if (item.wide) {
            for (int y = 0; y < k; y++, run += RUN) {
                _tile_loadd(RIGHT0, run, BACK);
                _tile_loadd(LEFT0, windows[0] + y * 32, LINE);
                _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
                _tile_loadd(LEFT1, windows[1] + y * 32, LINE);
                _tile_dpbf16ps(SUM1, LEFT1, RIGHT0);
                _tile_loadd(RIGHT1, run + LARGEST * RUN, BACK);
                _tile_loadd(LEFT0, windows[2] + y * 32, LINE);
                _tile_dpbf16ps(SUM2, LEFT0, RIGHT1);
                _tile_loadd(LEFT1, windows[3] + y * 32, LINE);
                _tile_dpbf16ps(SUM3, LEFT1, RIGHT1);
            }
        } else {
            for (int y = 0; y < k; y++, run += RUN) {
                _tile_loadd(RIGHT0, run, BACK);
                _tile_loadd(LEFT0, windows[0] + y * 32, LINE);
                _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
                _tile_loadd(RIGHT1, run + LARGEST * RUN, BACK);
                _tile_loadd(LEFT1, windows[1] + y * 32, LINE);
                _tile_dpbf16ps(SUM1, LEFT1, RIGHT1);
                _tile_loadd(RIGHT0, run + 2 * LARGEST * RUN, BACK);
                _tile_loadd(LEFT0, windows[2] + y * 32, LINE);
                _tile_dpbf16ps(SUM2, LEFT0, RIGHT0);
                _tile_loadd(RIGHT1, run + 3 * LARGEST * RUN, BACK);
                _tile_loadd(LEFT1, windows[3] + y * 32, LINE);
                _tile_dpbf16ps(SUM3, LEFT1, RIGHT1);
            }
        }
        store_each(work.sums[slot]);
    }

    // y + gain * act(depthwise(y)) of two channels, side by side.
    void combine(const Item &item, const Block &block, int slot, int top, int rows, char *to, Work &work) const {
        const __m512i order = _mm512_add_epi16(  // 0 16 1 17 ...
            _mm512_srli_epi32(_mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), 1),
            _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
        const int step = item.wide ? 2 : 1;  // from a channel's sums to the next one's
        for (int pair = 0; pair < 2; pair++) {
            const int a = item.wide ? pair : 2 * pair, b = a + step;
            const int channel = item.channel + (item.wide ? 0 : a), strip = item.strip + (item.wide ? pair : 0);
            const float *sum_a = work.sums[slot] + a * SIDE * SIDE, *sum_b = work.sums[slot] + b * SIDE * SIDE;
            const uint16_t *x_a = work.windows[slot][a] + before * 33, *x_b = work.windows[slot][b] + before * 33;
            const __m512 bias_a = _mm512_set1_ps(block.bias[channel]), bias_b = _mm512_set1_ps(block.bias[channel + 1]);
            const __m512 gain_a = _mm512_set1_ps(block.gain[channel]), gain_b = _mm512_set1_ps(block.gain[channel + 1]);
            char *line = to + ((long)top * strips + strip) * bundle(2 * dim) + channel * 32L;
            for (int i = 0; i < rows; i++, line += strips * bundle(2 * dim)) {
                const __m512 va = activate<uint16_t>(_mm512_add_ps(_mm512_load_ps(sum_a + i * SIDE), bias_a), RELU);
                const __m512 vb = activate<uint16_t>(_mm512_add_ps(_mm512_load_ps(sum_b + i * SIDE), bias_b), RELU);
                const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(gain_b, vb, widened(x_b + i * 32)),
                                                          _mm512_fmadd_ps(gain_a, va, widened(x_a + i * 32)));
                _mm512_storeu_si512(line, _mm512_permutexvar_epi16(order, (__m512i)both));
            }
        }
    }

    static __m512 widened(const uint16_t *x) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }

    void depthwise(const Block &block, int task, int threads, char *memory, Work &work) const {
        const auto [top, rows, first, last] = part(task, threads);
        const int pairs = strips / 2 * 2, each = pairs + strips % 2, items = (last - first) / 4 * each;
        configure(rows, (SIDE + k) / 2);
        const uint16_t *x = activations(memory);
        auto item = [&, first = first](int i) {
            const int channel = first + i / each * 4, j = i % each;
            return j < pairs ? Item{channel + j % 2 * 2, j / 2 * 2, true} : Item{channel, pairs, false};
        };
        if (items) prepare(item(0), block, top, rows, x, 0, work);
        for (int i = 0; i < items; i++) {
            // Ahead, as tiles must wait until what they load has left the store buffer.
            if (i + 1 < items) prepare(item(i + 1), block, top, rows, x, (i + 1) % 2, work);
            multiply(item(i), i % 2, work);
            combine(item(i), block, i % 2, top, rows, panel(memory), work);
        }
    }

    // ---- pointwise --------------------------------------------------------------------------------------------------

    void embed(int task, int threads, char *memory, Work &work) const {
        multiply_panel(model.stem, model.stem_inputs, model.stem_end, task, threads, memory, work);
    }
    void pointwise(const Block &block, int task, int threads, char *memory, Work &work) const {
        multiply_panel(block.pointwise, dim, block.end, task, threads, memory, work);
    }

    void multiply_panel(const void *packed, int inputs, const Affine &end, int task, int threads, char *memory,
                        Work &work) const {
        const char *weights = static_cast<const char *>(packed);
        const long group = inputs * 32L;  // bytes of the weights of 16 outputs
        const auto [first, last, from, to] = share(task, threads);
        configure(SIDE, SIDE);
        // As many positions at a time as leave room for the weights in the cache.
        const int chunks = (last - first) * 2 * bundle(2 * inputs) / (cache() / 2) + 1;
        const int step = (last - first + chunks - 1) / chunks;
        const int rate = (32 * 1024 + group - 1) / group;
        Ready ready{};
        int turn = 0;
        for (int begin = first; begin < last; begin += step) {
            for (int n = from; n < to; n += 32) {
                const char *a = weights + n / 16 * group, *ahead = a + 2 * group;
                for (int m = begin; m < std::min(begin + step, last); m++, turn = 1 - turn) {
                    const char *b = panel(memory) + 2 * m * bundle(2 * inputs);
                    float *sums = work.sums[turn];
                    int row = 0;
                    clear();
                    for (long i = 0; i < group; i += TILE_BYTES, ahead += 128) {
                        _mm_prefetch(ahead, _MM_HINT_T1);  // the next outputs' weights
                        _mm_prefetch(ahead + 64, _MM_HINT_T1);
                        _tile_loadd(LEFT0, a + i, LINE);
                        _tile_stream_loadd(RIGHT0, b + i, LINE);  // past the first-level cache, which the weights fill
                        _tile_stream_loadd(RIGHT1, b + bundle(2 * inputs) + i, LINE);
                        _tile_loadd(LEFT1, a + group + i, LINE);
                        _tile_dpbf16ps(SUM0, LEFT0, RIGHT0);
                        _tile_dpbf16ps(SUM1, LEFT0, RIGHT1);
                        _tile_dpbf16ps(SUM2, LEFT1, RIGHT0);
                        _tile_dpbf16ps(SUM3, LEFT1, RIGHT1);
                        if (ready.to)
                            for (int j = 0; j < rate && row < 32; j++) ready.finish(row++, end, plane);
                    }
                    store_square(sums);
                    ready = {activations(memory) + n * plane + m * 32L, sums, n};
                }
            }
        }
        if (ready.to)
            for (int row = 0; row < 32; row++) ready.finish(row, end, plane);
    }

    // Sums of 32 outputs at 32 positions: their rows are finished between the multiplications of the next ones.
    struct Ready {
        uint16_t *to;
        const float *sums;
        int n;
        void finish(int i, const Affine &end, long plane) const {
            const __m512 bias = _mm512_set1_ps(end.bias[n + i]);
            const __m512 scale = _mm512_set1_ps(end.scale[n + i]), shift = _mm512_set1_ps(end.shift[n + i]);
            const __m512 v = activate<uint16_t>(_mm512_add_ps(_mm512_load_ps(sums + i * 32), bias), RELU);
            const __m512 w = activate<uint16_t>(_mm512_add_ps(_mm512_load_ps(sums + i * 32 + 16), bias), RELU);
            _mm512_storeu_si512(to + i * plane, (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(w, scale, shift),
                                                                             _mm512_fmadd_ps(v, scale, shift)));
        }
    };

    void finish(int image, int first, int last, char *memory) const {
        for (int c = first; c < last; c++) {
            const uint16_t *x = activations(memory) + c * plane;
            __m512 total = _mm512_setzero_ps();
            for (int y = 0; y < height; y++) {
                __m512 sum = _mm512_setzero_ps();  // of a row: sums of sums are more exact
                for (int left = 0; left < width; left += SIDE) {
                    const __mmask16 here = width - left < SIDE ? (1u << (width - left)) - 1 : 0xffff;
                    const __m512 v = _mm512_maskz_mov_ps(here, widened(x + (long)y * columns + left));
                    if (pooled)
                        sum = _mm512_add_ps(sum, v);
                    else
                        _mm512_mask_storeu_ps(out + (((long)image * dim + c) * height + y) * width + left, here, v);
                }
                total = _mm512_add_ps(total, sum);
            }
            if (pooled) out[(long)image * dim + c] = _mm512_reduce_add_ps(total) / ((float)height * width);
        }
    }
};

}  // namespace

#endif
