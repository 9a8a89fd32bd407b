// Packing of floats into sign planes, for the two memory orders that matter and, by gathering, all others.
#pragma once

#include "kernel.h"

namespace foldbit {
namespace {

// Channels side by side in memory (channels-last): lanes are channels.
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

// Any other memory order: lanes are pixels, channels come one after another.
template <class V>
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
        typename V::Floats r;
        if (pack.stride_x == 1) {
          r = load_some<V>(x, pixels);
        } else {
          float gathered[kLanes] = {};
          for (int p = 0; p < pixels; ++p) gathered[p] = x[p * pack.stride_x];
          r = V::load(gathered);
        }
        for (int i = 0;; ++i) {
          words[i] = V::mark(words[i], r, 1u << (c - first));
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

template <class V>
void pack_row(const Pack& pack, int64_t image, int64_t y, int64_t begin, int64_t end) {
  const float* row = pack.x + image * pack.stride_image + y * pack.stride_y;
  const float* scales = pack.scales + image * pack.planes;
  const int64_t pixel = pack.runs * pack.words;
  const int64_t plane = pack.images * pack.height * pack.width * pixel;
  uint32_t* out = pack.out + (image * pack.height + y) * pack.width * pixel;
  if (pack.stride_channel == 1) {
    for (int64_t x = begin; x < end; ++x)
      pack_channel_lanes<V>(pack, row + x * pack.stride_x, scales, out + x * pixel, plane);
  } else {
    for (int64_t x = begin; x < end; x += kLanes)
      pack_pixel_lanes<V>(pack, row + x * pack.stride_x, scales, out + x * pixel, plane,
                          static_cast<int>(smaller(kLanes, end - x)));
  }
}

}  // namespace
}  // namespace foldbit
