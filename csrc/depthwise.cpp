// Depthwise convolutions, of one input and one output channel a group. In the layout of other convolutions each
// channel's bit would take a word, and each group a block of 16 lanes with one in use; here the groups share both.

#include "foldbit.h"

namespace foldbit {

bool is_depthwise(const Conv& conv) {
  return conv.groups > 1 && conv.segments == 1 && conv.channels == 1 && conv.out_channels == conv.groups &&
         conv.kernel_h * conv.kernel_w <= kMaxDepthwiseTaps;
}

void Depthwise::take(Pack& pack, Conv& conv) {
  const int64_t channels = conv.groups, words = (channels + kWordBits - 1) / kWordBits;
  const int64_t taps = conv.kernel_h * conv.kernel_w;
  const auto set = [](std::vector<uint32_t>& bits, int64_t word, int64_t channel, uint32_t bit) {
    bits[word + channel / kWordBits] |= (bit & 1) << channel % kWordBits;
  };
  weights.assign(conv.weight_planes * taps * words, 0);
  for (int64_t plane = 0; plane < conv.weight_planes; ++plane)
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t tap = 0; tap < taps; ++tap)
        set(weights, (plane * taps + tap) * words, channel,
            conv.weights[((plane * channels + channel) * taps + tap) * kLanes]);
  if (pack.thresholds) {
    const int64_t nodes = (int64_t(1) << pack.planes) - 1;
    thresholds.assign(nodes * words * kWordBits, 0.0f);
    flips.assign(words, 0);
    for (int64_t channel = 0; channel < channels; ++channel) {
      set(flips, 0, channel, pack.flips[channel]);
      for (int64_t node = 0; node < nodes; ++node)
        thresholds[node * words * kWordBits + channel] = pack.thresholds[(node * channels + channel) * kWordBits];
    }
    pack.thresholds = thresholds.data();
    pack.flips = flips.data();
  }
  pack.runs = 1;
  pack.words = conv.words = words;
  conv.depthwise = true;
  conv.weights = weights.data();
  conv.groups = 1;
  conv.blocks = (channels + kLanes - 1) / kLanes;
}

}  // namespace foldbit
