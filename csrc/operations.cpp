// Whole tensors: cuts operations into pieces, gives the pieces to threads, and keeps the scratch memory.

#include <algorithm>
#include <vector>

#include "foldbit.h"
#include "threads.h"

namespace foldbit {
namespace {

constexpr int64_t kPackValues = 8192;        // floats packed in one piece: a few microseconds
constexpr int64_t kBitsPerThread = 1 << 23;  // about ten microseconds with AVX2: woken for less, a thread is late
constexpr int64_t kOutputBits = 256;         // that take as long to multiply as writing one output does
constexpr int64_t kDepthwiseBits = 10;       // that take as long as one of a depthwise convolution
constexpr int64_t kPiecesPerThread = 4;      // of a convolution, at least, where it is large enough
constexpr int64_t kDepthwiseBlocks = 8;      // of a piece: half a kilobyte of a pixel's output
constexpr int64_t kScratchWords = 1 << 18;   // 1 MiB of packed activations at a time, or one image

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run_pack(Pack pack, int threads) {
  if (pack.stride_y == pack.width * pack.stride_x) {  // an image is one long row
    pack.width *= pack.height;
    pack.height = 1;
  }
  const int64_t pixels = ceil_div(kPackValues / pack.channels + 1, kLanes) * kLanes;
  const Kernels& kernels = current_kernels();
  const int64_t pieces = ceil_div(pack.width, pixels);  // of a row
  parallel_for(pack.images * pack.height * pieces, threads, [&](int64_t task) {
    const int64_t row = task / pieces, begin = task % pieces * pixels;
    kernels.pack(pack, row / pack.height, row % pack.height, begin, std::min(begin + pixels, pack.width));
  });
}

void run_conv(Conv conv, int threads) {
  const bool pixelwise = conv.kernel_h * conv.kernel_w == 1 && conv.stride_h * conv.stride_w == 1 &&
                         conv.pad_top + conv.pad_left == 0 && conv.out_height == conv.height &&
                         conv.out_width == conv.width;
  if (pixelwise) {  // an image is one long row
    conv.width = conv.out_width = conv.height * conv.width;
    conv.height = conv.out_height = 1;
    if (conv.width == 1) {  // and so is a batch of single pixels, such as a linear layer's
      conv.width = conv.out_width = conv.images;
      conv.images = 1;
      conv.scale_step = conv.activation_planes;
    }
  }
  if (conv.images * conv.out_height * conv.out_width == 0) return;
  const Kernels& kernels = current_kernels();
  const int64_t width = std::min(conv.out_width, kernels.piece_pixels);
  const int64_t height = std::min(conv.out_height, kernels.piece_pixels / width);
  const int64_t across = ceil_div(conv.out_width, width), down = ceil_div(conv.out_height, height);
  const int64_t strips = conv.images * down * across;
  // Of few pixels more blocks, but no less than a few pieces for each thread.
  const int64_t all_blocks = conv.groups * conv.blocks;
  const int64_t least = conv.depthwise ? kDepthwiseBlocks : kernels.piece_blocks;
  const int64_t most = std::max<int64_t>(1, all_blocks / least / (kPiecesPerThread * threads));
  const int64_t blocks = least * std::clamp<int64_t>(kernels.piece_pixels / (width * height), 1, most);
  // All images with some channels' weights, then with the next ones': of the two, packed images are small.
  parallel_for(ceil_div(all_blocks, blocks) * strips, threads, [&](int64_t task) {
    const int64_t block = task / strips * blocks;
    const int64_t strip = task % strips, x = strip % across * width, y = strip / across % down * height;
    (conv.depthwise ? kernels.depthwise : kernels.conv)(
        conv, {strip / across / down, y, std::min(y + height, conv.out_height), x,
               std::min(x + width, conv.out_width), block, std::min(block + blocks, all_blocks)});
  });
}

// Kept by each calling thread, so that a network's layers reuse one another's memory.
template <class T>
struct Scratch {
  std::vector<T> memory;

  T* at_least(int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
  }
  void shrink_to(int64_t size) {
    if (static_cast<int64_t>(memory.size()) > size) std::vector<T>().swap(memory);
  }
};

// [planes, out_channels, segments] to [planes, groups, blocks, segments, kLanes]; unused lanes are 0.
void scales_by_block(const Conv& conv, const float* scales, float* out) {
  const int64_t per_group = conv.out_channels / conv.groups, segments = conv.segments;
  for (int64_t plane = 0; plane < conv.weight_planes; ++plane)
    for (int64_t group = 0; group < conv.groups; ++group)
      for (int64_t block = 0; block < conv.blocks; ++block) {
        const int64_t channel = plane * conv.out_channels + group * per_group + block * kLanes;
        const int64_t lanes = std::min<int64_t>(kLanes, per_group - block * kLanes);
        const float* from = scales + channel * segments;
        for (int64_t segment = 0; segment < segments; ++segment, out += kLanes) {
          std::fill_n(out + lanes, kLanes - lanes, 0.0f);
          if (segments == 1)  // nearly always, and then in one go: this is done for every call
            std::copy_n(from, lanes, out);
          else
            for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = from[lane * segments + segment];
        }
      }
}

}  // namespace

void pack_activation(const Pack& pack, int threads) { run_pack(pack, threads); }

void conv_integers(const Conv& conv, int threads) { run_conv(conv, threads); }

int useful_threads(const Conv& conv, int64_t pixels, int threads) {
  const int64_t outputs = pixels * conv.groups * conv.blocks * kLanes;
  const int64_t tap = conv.depthwise ? kDepthwiseBits : conv.segments * conv.words * kWordBits;
  const int64_t products = conv.activation_planes * conv.kernel_h * conv.kernel_w * tap;
  const int64_t passes = ceil_div(conv.activation_planes, 2) * conv.segments;
  const int64_t bits = outputs * conv.weight_planes * (products + passes * kOutputBits);
  return static_cast<int>(std::clamp<int64_t>(bits / kBitsPerThread, 1, threads));
}

void conv_fused(const Pack& pack, const Conv& conv, const float* weight_scales, const float* bias,
                const float* slopes, int threads) {
  thread_local Scratch<uint32_t> planes;
  thread_local Scratch<float> scales;

  const int64_t lanes = conv.groups * conv.blocks * kLanes;
  const int64_t scale_count = conv.weight_planes * conv.segments * lanes;
  float* weight_scales_by_block = scales.at_least(scale_count + 2 * lanes);
  float* bias_by_block = weight_scales_by_block + scale_count;
  float* slopes_by_block = bias_by_block + lanes;
  scales_by_block(conv, weight_scales, weight_scales_by_block);
  Conv one_value_a_channel = conv;  // which is what bias and slopes are
  one_value_a_channel.weight_planes = 1;
  one_value_a_channel.segments = 1;
  if (bias)
    scales_by_block(one_value_a_channel, bias, bias_by_block);
  else
    std::fill_n(bias_by_block, lanes, 0.0f);
  const bool relu = slopes && std::all_of(slopes, slopes + conv.out_channels, [](float s) { return s == 0; });
  if (slopes && !relu) scales_by_block(one_value_a_channel, slopes, slopes_by_block);

  const int64_t image_words = pack.planes * pack.height * pack.width * pack.runs * pack.words;
  const int64_t at_once = std::max<int64_t>(1, kScratchWords / std::max<int64_t>(1, image_words));
  for (int64_t first = 0; first < conv.images; first += at_once) {
    Pack p = pack;
    p.images = std::min(at_once, conv.images - first);
    p.x += first * pack.stride_image;
    p.scales += first * pack.planes;
    p.out = planes.at_least(p.images * image_words);
    run_pack(p, threads);

    Conv c = conv;
    c.images = p.images;
    c.activations = p.out;
    c.activation_plane = p.images * image_words / pack.planes;
    c.weight_scales = weight_scales_by_block;
    c.bias = bias_by_block;
    c.slopes = slopes && !relu ? slopes_by_block : nullptr;
    c.relu = relu;
    c.activation_scales = p.scales;
    const int64_t done = first * conv.out_height * conv.out_width * conv.out_channels;
    c.out += done;
    if (c.residual) c.residual += done;
    run_conv(c, threads);
  }
  planes.shrink_to(kScratchWords);
}

}  // namespace foldbit
