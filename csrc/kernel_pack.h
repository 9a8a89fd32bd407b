// Packing of floats into sign planes, for the two memory orders that matter and, by gathering, all others; and
// for both of them by scales or by thresholds.
#pragma once

#include "kernel.h"

namespace foldbit {
namespace {

// Walk down the tree of thresholds, level by level, for up to 32 values at once: compare(node) has a bit set
// where a value is below the node's threshold, and visit(level, bits) gets each plane's bits, not yet flipped.
template <int kPlanes, class Compare, class Visit>
void walk_thresholds(Compare compare, Visit visit) {
  uint32_t reach[1 << kPlanes];  // which values come by each node of the level
  reach[0] = ~0u;
  FOLDBIT_UNROLL
  for (int level = 0; level < kPlanes; ++level) {
    const int first = (1 << level) - 1;
    uint32_t bits = 0;
    FOLDBIT_UNROLL
    for (int i = first; i >= 0; --i) {  // backwards: the next level's nodes take the same memory
      const uint32_t here = reach[i], below = here & compare(first + i);
      bits |= below;
      reach[2 * i] = below;
      reach[2 * i + 1] = here & ~below;
    }
    visit(level, bits);
  }
}

// Channels side by side in memory (channels-last): lanes are channels. kWhole: runs are whole words, and so as good as
// one run.
template <class V, int kPlanes, bool kWhole>
void compare_channel_lanes(const Pack& pack, const float* row, int64_t pixels, uint32_t* out, int64_t plane) {
  const int64_t runs = kWhole ? 1 : pack.runs;
  const int64_t channels = pack.channels / runs;
  const int64_t node = pack.runs * pack.words * kWordBits;
  for (; pixels > 0; --pixels, row += pack.stride_x) {
    const float *x = row, *thresholds = pack.thresholds;
    const uint32_t* flips = pack.flips;
    for (int64_t run = 0; run < runs; ++run, x += channels)
      for (int64_t first = 0; first < channels; first += kWordBits, ++out, ++flips, thresholds += kWordBits) {
        const int lanes = kWhole ? kWordBits : static_cast<int>(smaller(channels - first, kWordBits));
        const uint32_t used = lanes == kWordBits ? ~0u : (1u << lanes) - 1;
        const auto low = load_some<V>(x + first, static_cast<int>(smaller(lanes, kLanes)));
        const auto high = load_some<V>(x + first + kLanes, static_cast<int>(larger(lanes - kLanes, 0)));
        walk_thresholds<kPlanes>(
            [&](int i) {
              const float* t = thresholds + i * node;
              return V::below(low, high, V::load(t), V::load(t + kLanes));
            },
            [&](int level, uint32_t bits) { out[level * plane] = (bits ^ *flips) & used; });
      }
  }
}

template <class V>
void pack_channel_lanes(const Pack& pack, const float* x, const float* scales, uint32_t* out, int64_t plane) {
  const int64_t channels = pack.channels / pack.runs;
  for (int64_t run = 0; run < pack.runs; ++run, x += channels)
    for (int64_t first = 0; first < channels; first += kWordBits, ++out) {
      const int lanes = static_cast<int>(smaller(channels - first, kWordBits));
      const uint32_t used = lanes == kWordBits ? ~0u : (1u << lanes) - 1;
      auto low = load_some<V>(x + first, static_cast<int>(smaller(lanes, kLanes)));
      auto high = load_some<V>(x + first + kLanes, static_cast<int>(larger(lanes - kLanes, 0)));
      for (int i = 0;; ++i) {
        out[i * plane] = (V::negative(low) | V::negative(high) << kLanes) & used;
        if (i + 1 == pack.planes) break;
        low = V::residual(low, V::broadcast(scales[i]));
        high = V::residual(high, V::broadcast(scales[i]));
      }
    }
}

// Any other memory order: lanes are pixels, channels come one after another. By thresholds where there are
// kThresholdPlanes planes, by scales where that is 0.
template <class V, int kThresholdPlanes>
void pack_pixel_lanes(const Pack& pack, const float* x, const float* scales, uint32_t* out, int64_t plane,
                      int pixels) {
  const int64_t channels = pack.channels / pack.runs;
  const int64_t pixel = pack.runs * pack.words;
  for (int64_t run = 0; run < pack.runs; ++run)
    for (int64_t first = 0; first < channels; first += kWordBits, ++out) {
      const int64_t last = smaller(first + kWordBits, channels);
      typename V::Words words[kMaxPlanes];
      for (int i = 0; i < pack.planes; ++i) words[i] = V::no_words();
      for (int64_t c = first; c < last; ++c, x += pack.stride_channel) {
        const uint32_t bit = 1u << (c - first);
        typename V::Floats r;
        if (pack.stride_x == 1) {
          r = load_some<V>(x, pixels);
        } else {
          float gathered[kLanes] = {};
          for (int p = 0; p < pixels; ++p) gathered[p] = x[p * pack.stride_x];
          r = V::load(gathered);
        }
        if constexpr (kThresholdPlanes > 0) {
          const int64_t word = run * pack.words + first / kWordBits;
          const float* thresholds = pack.thresholds + word * kWordBits + (c - first);
          const uint32_t flip = pack.flips[word] & bit ? ~0u : 0;
          walk_thresholds<kThresholdPlanes>(
              [&](int i) { return V::below(r, V::broadcast(thresholds[i * pixel * kWordBits])); },
              [&](int i, uint32_t bits) { words[i] = V::mark_lanes(words[i], bits ^ flip, bit); });
          continue;
        }
        for (int i = 0;; ++i) {
          words[i] = V::mark(words[i], r, bit);
          if (i + 1 == pack.planes) break;
          r = V::residual(r, V::broadcast(scales[i]));
        }
      }
      for (int i = 0; i < pack.planes; ++i) {
        uint32_t lanes[kLanes];
        V::store(lanes, words[i]);
        for (int p = 0; p < pixels; ++p) out[i * plane + p * pixel] = lanes[p];
      }
    }
}

template <class V, int kThresholdPlanes>
void pack_row_by(const Pack& pack, int64_t image, int64_t y, int64_t begin, int64_t end) {
  const float* row = pack.x + image * pack.stride_image + y * pack.stride_y;
  const float* scales = pack.scales + image * pack.planes;
  const int64_t pixel = pack.runs * pack.words;
  const int64_t plane = pack.images * pack.height * pack.width * pixel;
  uint32_t* out = pack.out + (image * pack.height + y) * pack.width * pixel;
  if (pack.stride_channel == 1) {
    if constexpr (kThresholdPlanes > 0) {
      const bool whole = pack.channels == pixel * kWordBits;
      const auto compare = whole ? compare_channel_lanes<V, kThresholdPlanes, true>
                                 : compare_channel_lanes<V, kThresholdPlanes, false>;
      compare(pack, row + begin * pack.stride_x, end - begin, out + begin * pixel, plane);
    } else {
      for (int64_t x = begin; x < end; ++x)
        pack_channel_lanes<V>(pack, row + x * pack.stride_x, scales, out + x * pixel, plane);
    }
  } else {
    for (int64_t x = begin; x < end; x += kLanes)
      pack_pixel_lanes<V, kThresholdPlanes>(pack, row + x * pack.stride_x, scales, out + x * pixel, plane,
                          static_cast<int>(smaller(kLanes, end - x)));
  }
}

template <class V>
void pack_row(const Pack& pack, int64_t image, int64_t y, int64_t begin, int64_t end) {
  switch (pack.thresholds ? pack.planes : 0) {
    case 1: return pack_row_by<V, 1>(pack, image, y, begin, end);
    case 2: return pack_row_by<V, 2>(pack, image, y, begin, end);
    case 3: return pack_row_by<V, 3>(pack, image, y, begin, end);
    case 4: return pack_row_by<V, 4>(pack, image, y, begin, end);
    default: return pack_row_by<V, 0>(pack, image, y, begin, end);
  }
}

}  // namespace
}  // namespace foldbit
