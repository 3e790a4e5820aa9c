// Forward and backward pass of a whole ConvMixer, from the images to the last block's output, in one call each.
//
// With l counting layers (the stem, then depthwise and pointwise of each block) and a BatchNorm's output written as
// scale * act(u) + shift, a block is  c = depthwise(x) + bias,  z = x + scale * act(c) + shift,  u = W z + bias.
// Kept for the backward pass are u and c of each block; x and z are computed anew. A phase is one pass over its maps, and
// what it leaves for BatchNorm are sums per channel. Threads share the tasks of a phase in equal runs, and meet at its end:
//
//   phase      task             reads                       writes    computes
//   embed      image, part      images                      u         patch embedding
//   spatial    images, channel  u before                    c         x, depthwise
//   mix        image, part      c, u before                 u         z, u = W z
//   finish     image, channel   u                           features
//
//   begin      image, channel   features' gradient, u       gradient
//   unmix      image, part      u, c, u before, gradient    gradient  gradients of u, of W (by z), of z
//   unspatial  images, channel  c, u before, gradient       gradient  gradients of c, of its kernel (by x), of x
//   unembed    image, part      images, u, gradient                   gradients of u, of the embedding
//
// That is 5 maps read or written forward and 9 backward, for each block and image; with c computed anew 2 more. The one
// gradient map is overwritten in place. Each thread adds up its own sums and weight gradients; they are added in the
// order of the threads, so that the same number of threads gives the same bits.

#include <new>

#include "train_amx.h"
#include "train_fma.h"

namespace {

// Cuts memory into arrays; from address 0 it counts how much they need.
struct Carver {
    uintptr_t start, at;
    explicit Carver(char *memory) : start(reinterpret_cast<uintptr_t>(memory)), at(start) {}
    template <typename V>
    V *take(long count) {
        V *array = reinterpret_cast<V *>(at);
        at += (count * sizeof(V) + 63) / 64 * 64;
        return array;
    }
    long bytes() const { return at - start; }
};

// Of a layer, a value for each channel.
struct Vectors {
    float *center;          // about the mean of act(u), which sums are relative to
    float *offset;          // from there to the mean
    float *deviation;       // 1 / sqrt(var + eps)
    float *scale, *shift;
    Vectors(Carver &carver, int channels) {
        for (float **vector : {&center, &offset, &deviation, &scale, &shift}) *vector = carver.take<float>(channels);
    }
};

// What is kept from the forward to the backward pass.
template <typename T>
struct Kept {
    std::vector<Vectors> vectors;
    std::vector<T *> u, c;  // of each layer that has it: u of the stem and the blocks, c of the blocks
    T *gradient;
    long bytes;

    Kept(const Step &step, const Grid &grid, char *memory) {
        Carver carver(memory);
        for (int l = 0; l < 2 * step.depth + 1; l++) vectors.emplace_back(carver, grid.channels);
        auto maps = [&](std::vector<T *> &of, int count, int distinct) {
            for (int i = 0; i < count; i++)
                of.push_back(i < distinct ? carver.take<T>(grid.values(step.batch)) : of[i - distinct]);
        };
        maps(u, step.depth + 1, step.keep ? step.depth + 1 : 2);
        if (step.keep == 2) maps(c, step.depth, step.depth);
        bytes = carver.bytes();
        // The rest lies elsewhere: c of one block at a time, if it is not kept, and the gradient.
        Carver scratch(step.scratch);
        if (step.keep < 2) c.assign(step.depth, scratch.take<T>(grid.values(step.batch)));
        gradient = scratch.take<T>(grid.values(step.batch));
    }
};

// Memory of one thread.
template <class Gemm, class Depthwise>
struct Scratch {
    using Factor = typename Gemm::Value;      // of operands of a matrix multiplication
    using Value = typename Depthwise::Value;  // of planes
    Lane *first, *second, *bias;  // (channels) sums: of the gradient or act(u), of their product or its square
    Lane *taps;                   // (channels, k) of the gradient of depthwise kernels
    float *products;              // of the gradient of a pointwise convolution, or the stem: blocks
    char *panel, *transposed;
    Factor *rows, *columns;
    Value *x, *grad;  // (2, group) and (group) planes
    float *acts;      // act of what x is made of
    long bytes;

    Scratch(const Grid &grid, int k, int inputs, long plane, char *memory) {
        Carver carver(memory);
        const int n = grid.channels, most = std::max(n, inputs);
        first = carver.take<Lane>(n), second = carver.take<Lane>(n), bias = carver.take<Lane>(n);
        taps = carver.take<Lane>((long)n * k);
        products = carver.take<float>((long)n * most);
        sums_end = carver.bytes();
        panel = carver.take<char>(grid.tile / SIDE * Gemm::bundle(most));
        transposed = carver.take<char>(most / SIDE * Gemm::bundle(grid.tile));
        rows = carver.take<Factor>(n * Gemm::stride(grid.tile));
        columns = carver.take<Factor>(SIDE * Gemm::stride(grid.tile));
        planes_start = carver.bytes();
        x = carver.take<Value>(2 * grid.group * plane), grad = carver.take<Value>(grid.group * plane);
        planes_end = carver.bytes();
        acts = carver.take<float>((long)grid.group * grid.height * grid.columns);
        bytes = carver.bytes();
    }
    // All sums, and what surrounds an image in its plane.
    void clear(char *memory) const {
        std::memset(memory, 0, sums_end);
        std::memset(memory + planes_start, 0, planes_end - planes_start);
    }

  private:
    long sums_end, planes_start, planes_end;
};

// T: of maps. Gemm and Depthwise compute the two kinds of convolutions, see train_amx.h and train_fma.h.
template <typename T, class Gemm, class Depthwise, bool RELU>
class Trainer {
    using Factor = typename Gemm::Value;
    using Value = typename Depthwise::Value;
    using Kernel = typename Depthwise::Kernel;
    using Scratch = ::Scratch<Gemm, Depthwise>;

    const Step &step;
    const Grid grid;
    const Kept<T> kept;
    const int k, before, dim, channels, inputs;  // of the stem, filled up
    const long plane_row, plane;                 // values of a plane
    const double count;                          // values per channel
    T *const gradient;  // of the map that comes next

    Factor *weights;                  // of the layer that comes next, packed
    float *grad_scale, *grad_shift, *grad_value;  // gradient of act(u): scale * gradient + value * act(u) + shift
    std::vector<Scratch> scratch;                 // of each thread

  public:
    explicit Trainer(const Step &s)
        : step(s), grid(s, sizeof(Factor) * Gemm::PARTS), kept(s, grid, s.kept), k(s.kernel_size),
          before((k - 1) / 2), dim(s.dim), channels(grid.channels), inputs(rounded_up(s.in_chans * s.patch_size * s.patch_size, BLOCK)),
          plane_row(rounded_up(grid.columns + SIDE, BLOCK)), plane((grid.bands * SIDE + k - 1) * plane_row),
          count((double)s.batch * grid.height * grid.width), gradient(kept.gradient) {}

    // False: there was no memory.
    bool forward() {
        return run([this](Scratch &own) {
            prepare();
            pack(0, false);
            parts([&](int image, int first, int length) { embed(image, first, length, own); });
            settle_statistics(0);
            for (int i = 0; i < step.depth; i++) {
                pack(2 * i + 2, false);
                groups(2, [&](int image, int images, int n) { spatial(i, image, images, n, own); });
                settle_statistics(2 * i + 1);
                parts([&](int image, int first, int length) { mix(i, image, first, length, own); });
                settle_statistics(2 * i + 2);
            }
            maps([&](int image, int n) { finish(image, n); });
        });
    }

    bool backward() {
        return run([this](Scratch &own) {
            maps([&](int image, int n) { begin(image, n, own); });
            settle_gradients(2 * step.depth);
            for (int i = step.depth - 1; i >= 0; i--) {
                pack(2 * i + 2, true);
                if (step.keep == 1) {
                    groups(2, [&](int image, int images, int n) { spatial(i, image, images, n, own); });
                    clear_sums();
                }
                parts([&](int image, int first, int length) { unmix(i, image, first, length, own); });
                settle_weights(2 * i + 2, channels, dim);
                settle_gradients(2 * i + 1);
                groups(1, [&](int image, int images, int n) { unspatial(i, image, images, n, own); });
                settle_kernels(2 * i + 1);
                settle_gradients(2 * i);
            }
            parts([&](int image, int first, int length) { unembed(image, first, length, own); });
            settle_weights(0, inputs, step.in_chans * step.patch_size * step.patch_size);
        });
    }

  private:
    // ---- threads and their tasks ------------------------------------------------------------------------------------

    template <class Work>
    bool run(Work work) {
        thread_local Buffer shared;
        const auto lay_out = [&](Carver carver) {
            weights = carver.take<Factor>((long)channels * std::max(channels, inputs) * Gemm::PARTS);
            for (float **vector : {&grad_scale, &grad_shift, &grad_value}) *vector = carver.take<float>(channels);
            return carver.bytes();
        };
        char *memory = shared.take(lay_out(Carver(nullptr)));
        if (memory == nullptr) return false;
        lay_out(Carver(memory));
        const long bytes = Scratch(grid, k, inputs, plane, nullptr).bytes;
        scratch.reserve(step.threads);  // nothing may be thrown between threads
        bool failed = false;
#pragma omp parallel num_threads(step.threads)
        {
#pragma omp single
            scratch.assign(omp_get_num_threads(), Scratch(grid, k, inputs, plane, nullptr));
            thread_local Buffer buffer;
            char *own = buffer.take(bytes);
            if (own == nullptr) {
#pragma omp atomic write
                failed = true;
            } else {
                Scratch &of_thread = scratch[omp_get_thread_num()];
                of_thread = Scratch(grid, k, inputs, plane, own);
                of_thread.clear(own);
            }
#pragma omp barrier
            if (!failed) {
                const unsigned modes = _mm_getcsr();
                _mm_setcsr(modes | 0x8040);  // denormals count as zero, as AMX has it: with them all takes far longer
                Gemm::begin();
                work(scratch[omp_get_thread_num()]);
                Gemm::end();
                _mm_setcsr(modes);
            }
        }
        return !failed;
    }

    // The same run of tasks for the same thread, always; threads meet afterwards.
    template <class Task>
    static void each(long tasks, Task task) {
        const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (long i = tasks * thread / threads; i < tasks * (thread + 1) / threads; i++) task(i);
#pragma omp barrier
    }
    template <class Task>
    void parts(Task task) const {
        each((long)step.batch * grid.tiles, [&](long i) {
            const int first = i % grid.tiles * grid.tile;
            task(i / grid.tiles, first, std::min(grid.tile, grid.positions - first));
        });
    }
    template <class Task>
    void groups(int each_channels, Task task) const {  // of groups of images, and of so many channels at a time
        const int runs = channels / each_channels;
        each((long)grid.groups * runs, [&](long i) {
            const int image = i / runs * grid.group;
            task(image, std::min(grid.group, step.batch - image), i % runs * each_channels);
        });
    }
    template <class Task>
    void maps(Task task) const {
        each((long)step.batch * channels, [&](long i) { task(i / channels, i % channels); });
    }

    // ---- between the phases -----------------------------------------------------------------------------------------

    // About the mean of act(u) of a layer, from parameters alone, as reference.py has it.
    double expected(int l, int n) const {
        const Layer &layer = step.layers[l];
        double mean = layer.bias[n];
        if (l % 2) {  // depthwise, of the output of the layer before
            double sum = 0;
            for (int i = 0; i < k * k; i++) sum += layer.weight[(long)n * k * k + i];
            mean += sum * step.layers[l - 1].norm_bias[n];
        } else if (l) {  // pointwise, of the sum of the outputs of both layers before
            const float *spatial = step.layers[l - 1].norm_bias, *carried = step.layers[l - 2].norm_bias;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < dim; i++)
                sum += (double)layer.weight[(long)n * dim + i] * ((double)spatial[i] + carried[i]);
            mean += sum;
        }
        return RELU ? std::max(mean, 0.0) : mean * 0.5 * std::erfc(-mean * 0.70710678118654752);
    }

    void prepare() const {
        each((2l * step.depth + 1) * channels, [&](long i) {
            const int l = i / channels, n = i % channels;
            const Layer &layer = step.layers[l];
            const Vectors &vectors = kept.vectors[l];
            const bool real = n < dim;
            vectors.offset[n] = vectors.deviation[n] = vectors.scale[n] = vectors.shift[n] = 0;
            vectors.center[n] = !real ? 0 : layer.batch ? expected(l, n) : layer.mean[n];
            if (real && !layer.batch) normalize(l, n, layer.mean[n], layer.var[n]);
        });
    }

    void normalize(int l, int n, double mean, double var) const {
        const Layer &layer = step.layers[l];
        const Vectors &vectors = kept.vectors[l];
        const double deviation = 1 / std::sqrt(var + layer.eps);
        vectors.deviation[n] = deviation;
        vectors.scale[n] = layer.norm_weight[n] * deviation;
        vectors.shift[n] = layer.norm_bias[n] - mean * layer.norm_weight[n] * deviation;
    }

    double gather(Lane *Scratch::*sums, long n) {  // of all threads; they begin anew
        double sum = 0;
        for (Scratch &each : scratch) {
            sum += total((each.*sums)[n]);
            std::memset((each.*sums)[n], 0, sizeof(Lane));
        }
        return sum;
    }

    void clear_sums() {
        each(channels, [&](long n) { gather(&Scratch::first, n), gather(&Scratch::second, n); });
    }

    // Mean, variance, scale and shift, of the sums of act(u) about the center and of its square.
    void settle_statistics(int l) {
        each(channels, [&](long n) {
            const double sum = gather(&Scratch::first, n), squares = gather(&Scratch::second, n);
            const Layer &layer = step.layers[l];
            if (n >= dim || !layer.batch) return;
            const double offset = sum / count, var = std::max(squares / count - offset * offset, 0.0);
            const double mean = kept.vectors[l].center[n] + offset;
            kept.vectors[l].offset[n] = offset;
            normalize(l, n, mean, var);
            layer.moments[n] = mean;
            layer.moments[dim + n] = var;
            layer.moments[2l * dim + n] = var * (count / (count - 1));
        });
    }

    // Gradients of the BatchNorm, and how that of act(u) is made, of the sums of the gradient and of its product with act(u).
    void settle_gradients(int l) {
        each(channels, [&](long n) {
            const double sum = gather(&Scratch::first, n), product = gather(&Scratch::second, n);
            const Layer &layer = step.layers[l];
            const Vectors &vectors = kept.vectors[l];
            const double deviation = vectors.deviation[n], scale = vectors.scale[n];
            const double of_weight = deviation * (product - vectors.offset[n] * sum);
            grad_scale[n] = scale, grad_shift[n] = grad_value[n] = 0;
            if (n >= dim) return;
            layer.grad_norm_weight[n] = of_weight, layer.grad_norm_bias[n] = sum;
            if (!layer.batch) return;
            const double value = -scale * deviation * of_weight / count;
            grad_value[n] = value;
            grad_shift[n] = -scale * sum / count - value * ((double)vectors.center[n] + vectors.offset[n]);
        });
    }

    // Gradients of weight and bias of the stem or a pointwise convolution, which has `columns` inputs, `real` without filling.
    void settle_weights(int l, int columns, int real) {
        each(channels, [&](long n) {
            const double sum = gather(&Scratch::bias, n);
            const Layer &layer = step.layers[l];
            if (n < dim) layer.grad_bias[n] = sum;
            for (int m = 0; m < columns; m += BLOCK) {
                const long start = (n / BLOCK * (columns / BLOCK) + m / BLOCK) * BLOCK * BLOCK + n % BLOCK * BLOCK;
                float line[BLOCK] = {};
                for (Scratch &each : scratch) {
                    for (int i = 0; i < BLOCK; i++) line[i] += each.products[start + i], each.products[start + i] = 0;
                }
                if (n < dim && m < real)
                    std::memcpy(layer.grad_weight + n * real + m, line, std::min(BLOCK, real - m) * sizeof(float));
            }
        });
    }

    void settle_kernels(int l) {
        each(channels, [&](long n) {
            const double sum = gather(&Scratch::bias, n);
            const Layer &layer = step.layers[l];
            if (n < dim) layer.grad_bias[n] = sum;
            for (int y = 0; y < k; y++) {
                Lane line = {};
                for (Scratch &each : scratch) {
                    Lane &part = each.taps[n * k + y];
                    for (int i = 0; i < TAPS; i++) line[i] += part[i], part[i] = 0;
                }
                if (n < dim) std::memcpy(layer.grad_weight + (n * k + y) * k, line, k * sizeof(float));
            }
        });
    }

    // The weights of the stem or a pointwise convolution as a left operand; its transpose for gradients.
    void pack(int l, bool transposed) const {
        const float *weight = step.layers[l].weight;
        const int real = l ? dim : step.in_chans * step.patch_size * step.patch_size, columns = l ? channels : inputs;
        each(channels / LANES, [&](long i) {
            Gemm::pack(weights, columns, i * LANES, (i + 1) * LANES, [&](int n, int m) {
                const bool inside = n < dim && m < real;
                return !inside ? 0.0f : transposed ? weight[(long)m * dim + n] : weight[(long)n * real + m];
            });
        });
    }

    // ---- parts of a phase -------------------------------------------------------------------------------------------

    const T *at(const T *map, int image, int n) const { return map + ((long)image * channels + n) * grid.positions; }
    T *at(T *map, int image, int n) const { return map + ((long)image * channels + n) * grid.positions; }

    static __m512 act(__m512 v) { return activate<T>(v, RELU); }
    static __m512 stored(__m512 v) { return kept_as(v, static_cast<const T *>(nullptr)); }
    static __m512 all(float v) { return _mm512_set1_ps(v); }

    // z of one channel, from c and u of the layer before.
    struct Mixed {
        const T *c, *u;
        __m512 scale, scale_before, shift;
        __m512 operator()(int p, __mmask16 real) const {
            const __m512 x = _mm512_fmadd_ps(scale_before, act(load_row(u + p)), shift);
            return _mm512_maskz_fmadd_ps(real, scale, act(load_row(c + p)), x);
        }
    };
    Mixed mixed(int i, int image, int n) const {
        const Vectors &own = kept.vectors[2 * i + 1], &carried = kept.vectors[2 * i];
        return {at(kept.c[i], image, n), at(kept.u[i], image, n), all(own.scale[n]), all(carried.scale[n]),
                all(own.shift[n] + carried.shift[n])};
    }

    // Input i of the patches at 16 positions.
    struct Patch {
        const float *pixels;  // the input's pixel of the first patch
        const Grid &grid;
        int patch, width;
        bool exists;
        __m512 operator()(int p, __mmask16 real) const {
            if (!exists) return _mm512_setzero_ps();
            const int y = p / grid.columns, x = p % grid.columns;
            const __m512i offsets = _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(patch));
            const float *from = pixels + ((long)y * width + x) * patch;
            return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), real, offsets, from, 4);
        }
    };
    Patch patch(int image, int i) const {
        const int p = step.patch_size, c = i / (p * p), y = i / p % p, x = i % p;
        const long offset = (((long)image * step.in_chans + c) * step.height + y) * step.width + x;
        return {step.images + offset, grid, p, step.width, c < step.in_chans};
    }

    // The panel of `sources(i)`, one for each input.
    template <class Sources>
    void fill(int count, int first, int length, char *panel, Sources sources) const {
        const long bundle = Gemm::bundle(count);
        for (int i = 0; i < count; i += 2) {
            const auto one = sources(i), two = sources(i + 1);
            for (int p = 0; p < length; p += BLOCK) {
                const __mmask32 real = grid.masks[(first + p) / BLOCK];
                const __m512 a[2] = {one(first + p, real), one(first + p + LANES, real >> LANES)};
                const __m512 b[2] = {two(first + p, real), two(first + p + LANES, real >> LANES)};
                Gemm::put(panel, bundle, i, p, a, b);
            }
        }
    }
    // Its transpose, whose columns are the inputs.
    template <class Sources>
    void fill_transposed(int count, int first, int length, Scratch &own, Sources sources) const {
        const long row = Gemm::stride(length);
        char *panel = own.transposed;
        for (int i = 0; i < count; i += SIDE, panel += Gemm::bundle(length)) {
            for (int j = 0; j < SIDE; j++) {
                const auto source = sources(i + j);
                for (int p = 0; p < length; p += BLOCK) {
                    const __mmask32 real = grid.masks[(first + p) / BLOCK];
                    const __m512 v[2] = {source(first + p, real), source(first + p + LANES, real >> LANES)};
                    Gemm::put_row(own.columns + j * row, p, v);
                }
            }
            for (int p = 0; p < length; p += BLOCK) Gemm::put_transposed(panel, p, own.columns, length);
        }
    }

    // u of a layer: the packed weights times the panel, and the sums of act(u).
    void multiply(int l, T *map, int image, int first, int length, int count, Scratch &own) const {
        const float *bias = step.layers[l].bias, *center = kept.vectors[l].center;
        Gemm::multiply(
            Gemm::packed(weights, count), own.panel, count, channels, length, [&](int n, int p, __m512 v, __m512 w) {
                const __m512 add = all(n < dim ? bias[n] : 0), middle = all(center[n]);
                const __mmask32 real = grid.masks[(first + p) / BLOCK];
                T *to = at(map, image, n) + first + p;
                v = stored(_mm512_add_ps(v, add)), w = stored(_mm512_add_ps(w, add));
                store_row(to, v), store_row(to + LANES, w);
                v = _mm512_maskz_sub_ps(real, act(v), middle), w = _mm512_maskz_sub_ps(real >> LANES, act(w), middle);
                add_to(own.first[n], _mm512_add_ps(v, w));
                add_to(own.second[n], _mm512_fmadd_ps(v, v, _mm512_mul_ps(w, w)));
            });
    }

    // The gradient of u of a layer as rows and, for a block, as a panel; its sums.
    template <bool PANEL>
    void activation_gradient(int l, int image, int first, int length, Scratch &own) const {
        const long bundle = Gemm::bundle(channels), row = Gemm::stride(length);
        for (int n = 0; n < channels; n += 2)
            for (int p = 0; p < length; p += BLOCK) {
                const __mmask32 real = grid.masks[(first + p) / BLOCK];
                __m512 grads[2][2];
                for (int j = 0; j < 2; j++) {
                    const T *u = at(kept.u[l / 2], image, n + j) + first + p, *g = at(gradient, image, n + j) + first + p;
                    const __m512 scale = all(grad_scale[n + j]), value = all(grad_value[n + j]), shift = all(grad_shift[n + j]);
                    for (int half = 0; half < 2; half++) {
                        const Activated a = with_slope<T, RELU>(load_row(u + half * LANES));
                        const __m512 of_act =
                            _mm512_fmadd_ps(scale, load_row(g + half * LANES), _mm512_fmadd_ps(value, a.value, shift));
                        grads[j][half] = _mm512_maskz_mul_ps(real >> half * LANES, a.slope, of_act);
                    }
                    Gemm::put_row(own.rows + (n + j) * row, p, grads[j]);
                    add_to(own.bias[n + j], _mm512_add_ps(grads[j][0], grads[j][1]));
                }
                if (PANEL) Gemm::put(own.panel, bundle, n, p, grads[0], grads[1]);
            }
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    void embed(int image, int first, int length, Scratch &own) const {
        fill(inputs, first, length, own.panel, [&](int i) { return patch(image, i); });
        multiply(0, kept.u[0], image, first, length, inputs, own);
    }

    void mix(int i, int image, int first, int length, Scratch &own) const {
        fill(channels, first, length, own.panel, [&](int n) { return mixed(i, image, n); });
        multiply(2 * i + 2, kept.u[i + 1], image, first, length, channels, own);
    }

    // x of a channel of some images, as planes whose border is `before` wide; and, where wanted, act(u).
    template <bool ACTS>
    void set_planes(int i, int image, int images, int n, Value *planes, Scratch &own) const {
        const Vectors &carried = kept.vectors[2 * i];
        const __m512 scale = all(carried.scale[n]), shift = all(carried.shift[n]);
        float *acts = own.acts;
        for (int j = 0; j < images; j++) {
            const T *u = at(kept.u[i], image + j, n);
            Value *to = planes + j * plane + before * (plane_row + 1);
            for (int y = 0; y < grid.height; y++, to += plane_row)
                for (int strip = 0; strip < grid.strips; strip++, u += SIDE, acts += SIDE) {
                    const __m512 a = act(load_row(u));
                    if (ACTS) _mm512_store_ps(acts, a);
                    store_row(to + strip * SIDE, grid.row_mask(strip), _mm512_fmadd_ps(a, scale, shift));
                }
        }
    }

    // Calls `work(tiles, count)` for four tiles of some images at a time, of which the first `count` are real.
    struct Tile {  // 16 x 16 positions
        int image, top, strip;
    };
    template <class Work>
    void tiles(int images, Work work) const {
        const int of_image = grid.bands * grid.strips, all = images * of_image;
        for (int first = 0; first < all; first += 4) {
            Tile tiles[4];
            const int count = std::min(4, all - first);
            for (int t = 0; t < 4; t++) {
                const int number = t < count ? first + t : first;
                tiles[t] = {number / of_image, number % of_image / grid.strips * SIDE, number % grid.strips};
            }
            work(tiles, count);
        }
    }
    long corner(const Tile &tile) const { return tile.image * plane + tile.top * plane_row + tile.strip * SIDE; }

    using Sums = float[4][SIDE * SIDE];
    void convolve(const Value *planes, const Kernel &kernel, const Tile (&tiles)[4], Sums &sums) const {
        const Value *corners[4];
        for (int t = 0; t < 4; t++) corners[t] = planes + corner(tiles[t]);
        Depthwise::convolve(corners, plane_row, kernel, k, sums);
    }
    // Calls `take(image, position in the map, mask, sums)` for each row of outputs.
    template <class Take>
    void take_rows(const Tile (&tiles)[4], int count, const Sums &sums, Take take) const {
        for (int t = 0; t < count; t++) {
            const __mmask16 real = grid.row_mask(tiles[t].strip);
            const int rows = std::min(SIDE, grid.height - tiles[t].top);
            int p = tiles[t].top * grid.columns + tiles[t].strip * SIDE;
            for (int r = 0; r < rows; r++, p += grid.columns)
                take(tiles[t].image, p, real, _mm512_load_ps(sums[t] + r * SIDE));
        }
    }

    // Channels n and n + 1: tiles must wait until what they load has left the store buffer, and there is more to do.
    void spatial(int i, int image, int images, int n, Scratch &own) const {
        const Layer &layer = step.layers[2 * i + 1];
        Kernel kernels[2];
        Value *const planes[2] = {own.x, own.x + grid.group * plane};
        for (int j = 0; j < 2; j++) {
            if (n + j < dim) kernels[j].set(layer.weight + (n + j) * (long)k * k, k, false);
            set_planes<false>(i, image, images, n + j, planes[j], own);
        }
        alignas(64) Sums sums[2];
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, squares[2] = {sum[0], sum[0]};
        tiles(images, [&](const Tile(&tiles)[4], int count) {
            for (int j = 0; j < 2; j++) convolve(planes[j], kernels[j], tiles, sums[j]);
            for (int j = 0; j < 2; j++) {
                const __m512 bias = all(n + j < dim ? layer.bias[n + j] : 0);
                const __m512 center = all(kept.vectors[2 * i + 1].center[n + j]);
                take_rows(tiles, count, sums[j], [&](int of, int p, __mmask16 real, __m512 v) {
                    v = stored(_mm512_add_ps(v, bias));
                    store_row(at(kept.c[i], image + of, n + j) + p, v);
                    v = _mm512_maskz_sub_ps(real, act(v), center);
                    sum[j] = _mm512_add_ps(sum[j], v), squares[j] = _mm512_fmadd_ps(v, v, squares[j]);
                });
            }
        });
        for (int j = 0; j < 2; j++) add_to(own.first[n + j], sum[j]), add_to(own.second[n + j], squares[j]);
    }

    // The last block's output.
    void finish(int image, int n) const {
        if (n >= dim) return;
        const Vectors &vectors = kept.vectors[2 * step.depth];
        const __m512 scale = all(vectors.scale[n]), shift = all(vectors.shift[n]);
        const T *u = at(kept.u[step.depth], image, n);
        T *to = static_cast<T *>(step.features) + ((long)image * dim + n) * grid.height * grid.width;
        for (int y = 0; y < grid.height; y++, to += grid.width)
            for (int strip = 0; strip < grid.strips; strip++, u += SIDE)
                store_row(to + strip * SIDE, grid.row_mask(strip), _mm512_fmadd_ps(act(load_row(u)), scale, shift));
    }

    // ---- backward ---------------------------------------------------------------------------------------------------

    // Takes over the gradient of the features.
    void begin(int image, int n, Scratch &own) const {
        const T *u = at(kept.u[step.depth], image, n);
        T *to = at(gradient, image, n);
        if (n >= dim) {
            std::memset(static_cast<void *>(to), 0, grid.positions * sizeof(T));
            return;
        }
        const T *from = static_cast<const T *>(step.features) + ((long)image * dim + n) * grid.height * grid.width;
        const __m512 center = all(kept.vectors[2 * step.depth].center[n]);
        __m512 sum = _mm512_setzero_ps(), product = sum;
        for (int y = 0; y < grid.height; y++, from += grid.width)
            for (int strip = 0; strip < grid.strips; strip++, u += SIDE, to += SIDE) {
                const __m512 g = load_some(from + strip * SIDE, grid.row_mask(strip));
                store_row(to, g);
                sum = _mm512_add_ps(sum, g);
                product = _mm512_fmadd_ps(g, _mm512_sub_ps(act(load_row(u)), center), product);
            }
        for (const T *end = at(gradient, image, n) + grid.positions; to < end; to += SIDE) store_row(to, _mm512_setzero_ps());
        add_to(own.first[n], sum), add_to(own.second[n], product);
    }
    static __m512 load_some(const float *p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
    static __m512 load_some(const uint16_t *p, __mmask16 m) { return widened(_mm256_maskz_loadu_epi16(m, p)); }

    void unmix(int i, int image, int first, int length, Scratch &own) const {
        const float *center = kept.vectors[2 * i + 1].center;
        activation_gradient<true>(2 * i + 2, image, first, length, own);
        fill_transposed(channels, first, length, own, [&](int n) { return mixed(i, image, n); });
        Gemm::accumulate(Gemm::rows(own.rows, length), own.transposed, length, channels, channels, own.products);
        Gemm::multiply(
            Gemm::packed(weights, channels), own.panel, channels, channels, length,
            [&](int n, int p, __m512 v, __m512 w) {  // zeros where positions are not real, and c may be anything
                const T *c = at(kept.c[i], image, n) + first + p;
                T *to = at(gradient, image, n) + first + p;
                const __m512 middle = all(center[n]);
                const __mmask32 real = grid.masks[(first + p) / BLOCK];
                store_row(to, v), store_row(to + LANES, w);
                add_to(own.first[n], _mm512_add_ps(v, w));
                v = _mm512_mul_ps(v, _mm512_maskz_sub_ps(real, act(load_row(c)), middle));
                w = _mm512_mul_ps(w, _mm512_maskz_sub_ps(real >> LANES, act(load_row(c + LANES)), middle));
                add_to(own.second[n], _mm512_add_ps(v, w));
            });
    }

    void unspatial(int i, int image, int images, int n, Scratch &own) const {
        const int l = 2 * i + 1, after = k / 2;
        const __m512 scale = all(grad_scale[n]), value = all(grad_value[n]), shift = all(grad_shift[n]);
        const __m512 center = all(kept.vectors[2 * i].center[n]);
        __m512 bias = _mm512_setzero_ps(), sum = bias, product = bias;
        for (int j = 0; j < images; j++) {
            const T *c = at(kept.c[i], image + j, n), *g = at(gradient, image + j, n);
            Value *to = own.grad + j * plane + after * (plane_row + 1);
            for (int y = 0; y < grid.height; y++, to += plane_row)
                for (int strip = 0; strip < grid.strips; strip++, c += SIDE, g += SIDE) {
                    const Activated a = with_slope<T, RELU>(load_row(c));
                    const __m512 of_act = _mm512_fmadd_ps(scale, load_row(g), _mm512_fmadd_ps(value, a.value, shift));
                    const __m512 v = _mm512_maskz_mul_ps(grid.row_mask(strip), a.slope, of_act);
                    store_row(to + strip * SIDE, grid.row_mask(strip), v);
                    bias = _mm512_add_ps(bias, v);
                }
        }
        set_planes<true>(i, image, images, n, own.x, own);
        Kernel kernel;
        if (n < dim) kernel.set(step.layers[l].weight + (long)n * k * k, k, true);
        alignas(64) Sums sums;
        typename Depthwise::Operands operands;
        tiles(images, [&](const Tile(&tiles)[4], int count) {
            const Value *corners[4], *grads[4];
            for (int t = 0; t < 4; t++) {
                corners[t] = own.x + corner(tiles[t]);
                grads[t] = own.grad + corner(tiles[t]) + after * (plane_row + 1);
            }
            // In this order since tiles must wait until what they load has left the store buffer.
            Depthwise::arrange(corners, grads, count, plane_row, k, operands);
            convolve(own.grad, kernel, tiles, sums);
            Depthwise::correlate(operands, k, own.taps + (long)n * k);
            take_rows(tiles, count, sums, [&](int of, int p, __mmask16 real, __m512 v) {
                T *to = at(gradient, image + of, n) + p;
                v = _mm512_maskz_add_ps(real, load_row(to), v);
                store_row(to, v);
                const __m512 a = _mm512_load_ps(own.acts + (long)of * grid.height * grid.columns + p);
                sum = _mm512_add_ps(sum, v), product = _mm512_fmadd_ps(v, _mm512_sub_ps(a, center), product);
            });
        });
        add_to(own.bias[n], bias), add_to(own.first[n], sum), add_to(own.second[n], product);
    }

    void unembed(int image, int first, int length, Scratch &own) const {
        activation_gradient<false>(0, image, first, length, own);
        fill_transposed(inputs, first, length, own, [&](int i) { return patch(image, i); });
        Gemm::accumulate(Gemm::rows(own.rows, length), own.transposed, length, channels, inputs, own.products);
    }
};

template <class Call>
int dispatch(const Step &step, bool bfloat16, Call call) {
    auto chosen = [&](auto type, auto gemm, auto depthwise) {
        using T = decltype(type);
        using Gemm = decltype(gemm);
        using Depthwise = decltype(depthwise);
        if (step.relu) return call(Trainer<T, Gemm, Depthwise, true>(step));
        return call(Trainer<T, Gemm, Depthwise, false>(step));
    };
#ifdef CONVMIXER_TILES
    if (tiles_permitted())
        return bfloat16 ? chosen(uint16_t(), TileGemm<1>(), TileDepthwise())
                    : chosen(float(), TileGemm<3>(), FmaDepthwise());
#endif
    return bfloat16 ? chosen(uint16_t(), FmaGemm(), FmaDepthwise()) : chosen(float(), FmaGemm(), FmaDepthwise());
}

template <class Call>
int guarded(Call call) {
    try {
        return call();
    } catch (const std::bad_alloc &) {
        return 0;
    }
}

}  // namespace

extern "C" {

// In bytes; Python compares them with those of its own records.
extern const int32_t convmixer_record_sizes[2];
const int32_t convmixer_record_sizes[2] = {sizeof(Layer), sizeof(Step)};

int convmixer_tiles() { return tiles_permitted(); }

// Return the bytes of `kept`, which training.py computes as well.
int64_t convmixer_bytes(const Step *step, int bfloat16) {
    const Grid grid(*step, bfloat16 ? 2 : 4);
    return bfloat16 ? Kept<uint16_t>(*step, grid, nullptr).bytes : Kept<float>(*step, grid, nullptr).bytes;
}

// Each returns 0 where there was too little memory, else 1. Feature maps are bfloat16 or, without `bfloat16`, float32.
int convmixer_forward(const Step *step, int bfloat16) {
    return guarded([&] { return dispatch(*step, bfloat16, [](auto trainer) { return (int)trainer.forward(); }); });
}
int convmixer_backward(const Step *step, int bfloat16) {
    return guarded([&] { return dispatch(*step, bfloat16, [](auto trainer) { return (int)trainer.backward(); }); });
}
}
