// Holds every instruction set that this machine runs against plain loops, with nothing but the C++ core: for
// machines without Python, under an emulator, and under sanitizers. Prints one line an instruction set; exits
// with 1 at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "foldbit.h"
#include "rows.h"
#include "solve.h"

using namespace foldbit;

namespace {

uint64_t state = 1;

uint32_t any() {  // of Knuth's linear congruential generator, the upper half
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
int64_t between(int64_t low, int64_t high) { return low + any() % (high - low + 1); }
float value() {  // with a few nasty ones
  switch (any() % 40) {
    case 0: return 0.0f;
    case 1: return -0.0f;
    case 2: return std::numeric_limits<float>::quiet_NaN();
    case 3: return -std::numeric_limits<float>::infinity();
    default: return static_cast<float>(static_cast<int32_t>(any())) / (1 << 30);
  }
}

template <class T>
std::vector<T> draw(int64_t size, T (*one)()) {
  std::vector<T> all(size);
  for (T& x : all) x = one();
  return all;
}

void require(bool right, const char* isa, const char* what) {
  if (right) return;
  std::printf("%s: %s is wrong\n", isa, what);
  std::exit(1);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) return false;  // NaN is NaN
  return a.size() == b.size();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One convolution: everything drawn at random, and its plain solution.
struct Problem {
  Pack pack{};
  Conv conv{};
  std::vector<float> x, scales, thresholds, weight_scales, bias, slopes, residual;
  std::vector<uint32_t> flips, weights, packed;
  std::vector<int32_t> integers;
  const bool depthwise = any() % 4 == 0, linear = any() % 8 == 0;
  bool relu;

  Problem() {
    const int64_t groups = depthwise ? between(2, 80) : between(1, 3), segments = groups == 1 ? between(1, 2) : 1;
    const int64_t runs = groups * segments, run = depthwise ? 1 : between(1, 70), words = ceil_div(run, kWordBits);
    const int64_t per_group = depthwise ? 1 : between(1, 90);
    pack.images = linear ? between(1, 80) : between(1, 2);
    pack.channels = runs * run;
    const bool long_rows = any() % 8 == 0;  // longer than goes out at once
    pack.height = linear ? 1 : between(1, long_rows ? 2 : 7);
    pack.width = linear ? 1 : long_rows ? 140 : between(1, 20);
    const bool channels_last = any() & 1;
    const int64_t pixels = pack.height * pack.width;
    pack.stride_channel = channels_last ? 1 : pixels;
    pack.stride_x = channels_last ? pack.channels : 1;
    pack.stride_y = pack.width * pack.stride_x;
    pack.stride_image = pack.channels * pixels;
    pack.planes = static_cast<int>(between(1, 4));
    pack.runs = runs;
    pack.words = words;
    x = draw(pack.images * pack.channels * pixels, value);
    scales = draw(pack.images * pack.planes, value);
    thresholds = draw(((1 << pack.planes) - 1) * runs * words * kWordBits, value);
    flips = draw(runs * words, any);
    pack.x = x.data();
    pack.scales = scales.data();
    if (any() & 1) {
      pack.thresholds = thresholds.data();
      pack.flips = flips.data();
    }

    conv.images = pack.images;
    conv.height = pack.height;
    conv.width = pack.width;
    conv.groups = groups;
    conv.segments = segments;
    conv.words = words;
    conv.channels = run;
    conv.blocks = ceil_div(per_group, kLanes);
    conv.out_channels = groups * per_group;
    const auto side = [&](int64_t low, int64_t high) { return linear ? low : between(low, high); };
    conv.kernel_h = side(1, 3);
    conv.kernel_w = side(1, 3);
    conv.stride_h = side(1, 2);
    conv.stride_w = side(1, 2);
    conv.pad_top = side(0, 2);
    conv.pad_left = side(0, 2);
    conv.dilation_h = side(1, 2);
    conv.dilation_w = side(1, 2);
    conv.out_height = side(1, long_rows ? 2 : 7);
    conv.out_width = linear ? 1 : long_rows ? 140 : between(1, 20);
    conv.weight_planes = static_cast<int>(between(1, 2));
    conv.activation_planes = pack.planes;
    weights = draw(conv.weight_planes * groups * conv.blocks * segments * conv.kernel_h * conv.kernel_w * words *
                       kLanes,
                   any);
    const uint32_t used = run % kWordBits ? (1u << run % kWordBits) - 1 : ~0u;
    for (size_t i = 0; i < weights.size(); ++i)
      if (int64_t(i) / kLanes % words == words - 1) weights[i] &= used;  // spare bits are 0
    conv.weights = weights.data();
    weight_scales = draw(conv.weight_planes * conv.out_channels * segments, value);
    bias = draw(conv.out_channels, value);
    slopes = draw(conv.out_channels, value);
    relu = any() & 1;
    if (relu) std::fill(slopes.begin(), slopes.end(), 0.0f);
    const int64_t out = conv.images * conv.out_height * conv.out_width * conv.out_channels;
    residual = draw(out, value);
    if (any() & 1) conv.residual = residual.data();
    packed.resize(pack.planes * pack.images * pixels * runs * words);
    integers.resize(conv.weight_planes * pack.planes * segments * out);
    solve_plainly();
  }

  void solve_plainly() {
    for (int64_t n = 0; n < pack.images; ++n)
      for (int64_t pixel = 0; pixel < pack.height * pack.width; ++pixel)
        for (int64_t c = 0; c < pack.channels; ++c) {
          const int64_t run = c / conv.channels, place = c % conv.channels, word = run * pack.words + place / 32;
          float r = x[n * pack.stride_image + pixel * pack.stride_x + c * pack.stride_channel];
          int64_t node = 0;
          for (int plane = 0; plane < pack.planes; ++plane) {
            bool bit;
            if (pack.thresholds) {
              const int64_t width = pack.runs * pack.words * kWordBits;
              const bool below = r < thresholds[node * width + word * kWordBits + place % 32];
              node = 2 * node + (below ? 1 : 2);
              bit = below != bool(flips[word] >> place % 32 & 1);
            } else {
              const float v = scales[n * pack.planes + plane];
              bit = r < 0;
              r -= bit ? -v : v;
            }
            const int64_t at = ((plane * pack.images + n) * pack.height * pack.width + pixel) * pack.runs * pack.words;
            packed[at + word] |= uint32_t(bit) << place % 32;
          }
        }
    int32_t* out = integers.data();
    const int64_t per_group = conv.out_channels / conv.groups;
    for (int i = 0; i < conv.weight_planes; ++i)
      for (int j = 0; j < pack.planes; ++j)
        for (int64_t s = 0; s < conv.segments; ++s)
          for (int64_t n = 0; n < conv.images; ++n)
            for (int64_t y = 0; y < conv.out_height; ++y)
              for (int64_t xx = 0; xx < conv.out_width; ++xx)
                for (int64_t o = 0; o < conv.out_channels; ++o)
                  *out++ = product(i, j, s, n, y, xx, o / per_group, o % per_group);
  }

  int32_t product(int i, int j, int64_t s, int64_t n, int64_t y, int64_t xx, int64_t group, int64_t o) const {
    int32_t sum = 0;
    for (int64_t ky = 0; ky < conv.kernel_h; ++ky)
      for (int64_t kx = 0; kx < conv.kernel_w; ++kx) {
        const int64_t iy = y * conv.stride_h - conv.pad_top + ky * conv.dilation_h;
        const int64_t ix = xx * conv.stride_w - conv.pad_left + kx * conv.dilation_w;
        if (iy < 0 || iy >= conv.height || ix < 0 || ix >= conv.width) continue;
        for (int64_t c = 0; c < conv.channels; ++c) {
          const int64_t a = (((j * conv.images + n) * conv.height + iy) * conv.width + ix) * pack.runs +
                            group * conv.segments + s;
          const int64_t block = (i * conv.groups + group) * conv.blocks + o / kLanes;
          const int64_t tap = ((block * conv.segments + s) * conv.kernel_h + ky) * conv.kernel_w + kx;
          const uint32_t left = packed[a * conv.words + c / 32];
          const uint32_t right = weights[(tap * conv.words + c / 32) * kLanes + o % kLanes];
          sum += ((left ^ right) >> c % 32 & 1) ? -1 : 1;
        }
      }
    return sum;
  }

  std::vector<float> floats() const {
    std::vector<float> out;
    const int64_t count = conv.images * conv.out_height * conv.out_width * conv.out_channels;
    const int64_t per_image = count / conv.images;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t o = at % conv.out_channels, n = at / per_image;
      float sum = bias[o];
      for (int64_t s = 0; s < conv.segments; ++s)
        for (int64_t i = 0; i < conv.weight_planes; ++i)
          for (int64_t j = 0; j < pack.planes; ++j) {
            const int32_t integer = integers[((i * pack.planes + j) * conv.segments + s) * count + at];
            const float scale =
                weight_scales[(i * conv.out_channels + o) * conv.segments + s] * scales[n * pack.planes + j];
            sum += scale * static_cast<float>(integer);
          }
      if (sum < 0) sum = relu ? 0 : sum * slopes[o];
      out.push_back(conv.residual ? sum + residual[at] : sum);
    }
    return out;
  }

  void check(const char* isa, int threads) {
    std::vector<uint32_t> words(packed.size());
    pack.out = words.data();
    pack_activation(pack, threads);
    require(same(words, packed), isa, "packing");
    conv.activations = packed.data();
    conv.activation_plane = static_cast<int64_t>(packed.size()) / pack.planes;
    std::vector<int32_t> got(integers.size());
    conv.integers = got.data();
    conv_integers(conv, threads);
    require(same(got, integers), isa, "a product of planes");
    conv.integers = nullptr;
    const std::vector<float> expected = floats();
    std::vector<float> out(expected.size());
    conv.out = out.data();
    conv_fused(pack, conv, weight_scales.data(), bias.data(), slopes.data(), threads);
    require(same(out, expected), isa, "a convolution");
    if (!depthwise) return;
    require(is_depthwise(conv), isa, "what is depthwise");
    Depthwise own;
    Pack own_pack = pack;
    Conv own_conv = conv;
    own.take(own_pack, own_conv);
    std::fill(out.begin(), out.end(), 0.0f);
    conv_fused(own_pack, own_conv, weight_scales.data(), bias.data(), slopes.data(), threads);
    require(same(out, expected), isa, "a depthwise convolution");
  }
};

// Of a 3x3 convolution, or a depthwise one, of so many channels and pixels.
int useful_of(int threads, int64_t channels, int64_t pixels, bool depthwise) {
  Conv conv{};
  conv.groups = conv.segments = 1;
  conv.blocks = ceil_div(channels, kLanes);
  conv.words = ceil_div(channels, kWordBits);
  conv.kernel_h = conv.kernel_w = 3;
  conv.weight_planes = conv.activation_planes = 1;
  conv.depthwise = depthwise;
  return useful_threads(conv, pixels, threads);
}

void check_useful_threads() {
  for (const bool depthwise : {false, true}) {
    require(useful_of(5, 64, 56 * 56, depthwise) == 5, "any", "the number of threads of a large layer");
    require(useful_of(5, 32, 7 * 7, depthwise) == 1, "any", "the number of threads of a small layer");
    require(useful_of(5, 32, 0, depthwise) == 1, "any", "the number of threads of no pixels");
  }
  require(useful_of(5, 64, 28 * 28, true) < useful_of(5, 64, 28 * 28, false), "any", "how dear depthwise is");
}

void check_solver(const char* isa, int threads) {
  const int64_t rows = between(1, 5), n = between(1, 400);
  std::vector<double> x(rows * n), scales(2 * rows), excess(rows);
  for (double& v : x) v = any() % 3 ? static_cast<double>(static_cast<int32_t>(any())) : 1e9;
  solve_rows(x.data(), rows, n, n, SolveScheme::two_planes, std::numeric_limits<double>::infinity(), 1e-12,
             threads, scales.data(), excess.data());
  for (int64_t row = 0; row < rows; ++row) {
    const auto error = [&](double v1, double v2) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double left = std::fabs(std::fabs(x[row * n + i]) - v1) - v2;
        sum += left * left;
      }
      return sum;
    };
    double energy = 0;
    for (int64_t i = 0; i < n; ++i) energy += x[row * n + i] * x[row * n + i];
    const double v1 = scales[2 * row], v2 = scales[2 * row + 1], reached = error(v1, v2);
    for (int64_t i = 0; i < n; ++i) {  // no split at a value does better
      const double limit = std::fabs(x[row * n + i]);
      double low = 0, high = 0, below = 0;
      for (int64_t k = 0; k < n; ++k) {
        const double magnitude = std::fabs(x[row * n + k]);
        (magnitude < limit ? low : high) += magnitude;
        below += magnitude < limit;
      }
      low = below > 0 ? low / below : high / (n - below);
      high /= n - below;
      require(reached <= error((high + low) / 2, (high - low) / 2) + 1e-9 * energy, isa, "a solution");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 200;
  check_useful_threads();
  for (const Kernels* kernels : runnable_kernels()) {
    force_kernels(kernels->name);
    state = 1;
    for (int i = 0; i < problems; ++i) {
      Problem().check(kernels->name, 1 + i % 3);
      check_solver(kernels->name, 1 + i % 3);
    }
    std::printf("%s: %d convolutions and as many solutions are right\n", kernels->name, problems);
  }
  // Several threads call at once, each with its own scratch.
  std::vector<std::thread> callers;
  std::vector<Problem> each(4);
  for (Problem& problem : each) callers.emplace_back([&problem] {
    for (int i = 0; i < 20; ++i) problem.check(current_kernels().name, 2);
  });
  for (std::thread& caller : callers) caller.join();
  std::printf("%zu threads at once are right\n", each.size());
}
