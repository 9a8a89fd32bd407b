// The kernels' interface: raw pointers and sizes. Knows neither Python nor torch.
//
// A value is kept as sign planes, a set bit meaning negative. The dot product of two planes of K signs is
// K - 2 * popcount(a xor b); everything here computes sums of such products over convolution windows.
// Layouts, described in src/foldbit/kernels/layout.py:
//   activations  uint32 [planes, images, height, width, runs, words],  runs = groups * segments
//   weights      uint32 [planes, groups, blocks, segments, kernel_h, kernel_w, words, kLanes]
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace foldbit {

constexpr int kWordBits = 32;
constexpr int kLanes = 16;     // output channels side by side in a block
constexpr int kMaxPlanes = 8;  // of activations or of weights
constexpr int kMaxThresholdPlanes = 4;  // that are folded by thresholds
constexpr int kMaxDepthwiseTaps = 255;  // of a window, so that bytes can count them

// Fold float values into planes, in one of two ways.
//   By scales: bit = r < 0, then r -= bit ? -scale : scale, for one scale after another.
//   By thresholds: down a binary tree of comparisons. The root is node 0, the child of node i is 2i + 1 where
//   x < thresholds[i] and 2i + 2 elsewhere; the bit is whether x < thresholds[i], inverted in the channels that
//   `flips` marks. Whatever happens to a value before it is folded, per channel and monotonically (batch norm,
//   clamp), is in the thresholds.
struct Pack {
  const float* x;
  int64_t images, channels, height, width;
  int64_t stride_image, stride_channel, stride_y, stride_x;  // in floats, any value
  const float* scales;                                       // [images, planes]
  const float* thresholds;                                   // [2^planes - 1, runs, words * 32], or null
  const uint32_t* flips;                                     // [runs, words]
  int planes;
  int64_t runs, words;  // a run is channels / runs channels, in words of its own
  uint32_t* out;        // [planes, images, height, width, runs, words]
};

// A convolution over packed planes. It writes the integers if asked for them, otherwise floats:
//   out[n, y, x, o] = bias[o] + sum over s, i, j of
//                     (weight_scales[i, o, s] * activation_scales[n, j]) * integer[i, j, s, n, y, x, o]
// with the additions made in that order: one result on every instruction set and any number of threads. Then,
// where there is a ReLU, or slopes, or a residual,
//   out = (out < 0 ? 0 or slope[o] * out : out) + residual
struct Conv {
  int64_t images, height, width;
  int64_t out_height, out_width, out_channels;
  int64_t groups, blocks, segments, words;
  int64_t channels;  // of one segment
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int weight_planes, activation_planes;
  bool depthwise;  // as Depthwise::take leaves it, or false
  bool relu;       // instead of slopes

  const uint32_t* activations;
  int64_t activation_plane;  // words from one plane to the next
  const uint32_t* weights;

  int32_t* integers;  // [weight_planes, activation_planes, segments, images, out_h, out_w, out_channels]

  float* out;                      // [images, out_h, out_w, out_channels]
  const float* weight_scales;      // [weight_planes, groups, blocks, segments, kLanes]
  const float* bias;               // [groups, blocks, kLanes]
  const float* slopes;             // [groups, blocks, kLanes], or null
  const float* residual;           // like out, or null
  const float* activation_scales;  // [images, activation_planes]
  int64_t scale_step;              // floats from one pixel's activation scales to the next one's: 0, unless
                                   // images were laid side by side as the pixels of one row
};

// A piece of a convolution's output: of an image rows [y_begin, y_end), of those pixels [x_begin, x_end), of
// those blocks [block_begin, block_end) of output channels, counted over all groups.
struct Piece {
  int64_t image, y_begin, y_end, x_begin, x_end, block_begin, block_end;
};

// What one instruction set offers. A kernel works on a piece, so that the pieces can go to threads.
struct Kernels {
  const char* name;
  uint32_t required;  // Features the CPU must have
  // Pixels [begin, end) of row y of an image.
  void (*pack)(const Pack&, int64_t image, int64_t y, int64_t begin, int64_t end);
  void (*conv)(const Conv&, const Piece&);
  void (*depthwise)(const Conv&, const Piece&);  // its floats only
  int64_t piece_pixels;  // the most that a piece may have
  int64_t piece_blocks;  // that are computed together: a piece should have a multiple
  RowKernels<float> float_rows;
  RowKernels<double> double_rows;
};

enum Features : uint32_t { kAvx2 = 1, kAvx512F = 2, kAvx512Vpopcntdq = 4 };

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;    // only where the build has FOLDBIT_X86
extern const Kernels avx512_kernels;  // only where the build has FOLDBIT_X86
extern const Kernels neon_kernels;    // only where the build has FOLDBIT_NEON

// dispatch.cpp: which kernels run. The best this machine has, unless another is forced.
std::vector<const Kernels*> runnable_kernels();  // worst first
const Kernels& current_kernels();
template <class T>
const RowKernels<T>& current_row_kernels();
bool force_kernels(const char* name);  // false where this machine cannot run it

// operations.cpp: whole tensors, shared among threads.
void pack_activation(const Pack& pack, int threads);
void conv_integers(const Conv& conv, int threads);

// Of so many threads, those for which a convolution of so many output pixels has enough work.
int useful_threads(const Conv& conv, int64_t pixels, int threads);

// Packs the float input, image by image or several at once, into scratch that `conv` then reads: of `pack`
// and `conv` the fields that point to scratch or to repacked scales are filled in here.
//   weight_scales [weight_planes, out_channels, segments];  bias, slopes [out_channels] or null; slopes of 0 are ReLU
void conv_fused(const Pack& pack, const Conv& conv, const float* weight_scales, const float* bias,
                const float* slopes, int threads);

// depthwise.cpp: a convolution of one input and one output channel a group, and of no more than kMaxDepthwiseTaps
// taps. Its groups can share words as if they were one:
//   activations [planes, images, height, width, 1, words], words = channels / 32
//   weights     [planes, kernel_h, kernel_w, words]
struct Depthwise {
  std::vector<uint32_t> weights, flips;
  std::vector<float> thresholds;

  // Brings pack and conv into that form, in which groups is 1 and `channels`, of a sum, stays 1. They point here from
  // then on.
  void take(Pack& pack, Conv& conv);
};
bool is_depthwise(const Conv& conv);  // not yet in that form

}  // namespace foldbit
