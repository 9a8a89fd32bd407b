// The part of the Python module foldbit._native that packs activations and convolves them.

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <array>

#include "foldbit.h"
#include "python_arrays.h"

namespace foldbit {
namespace {

constexpr const char* kWeightAxes = "planes, groups, blocks, segments, kernel_h, kernel_w, words, 16";

void set_runs(Pack& pack, int64_t channels, int64_t runs) {
  require(channels >= 1 && runs >= 1 && channels % runs == 0, "groups * segments = ", runs,
          " must divide the channels of x, got ", channels);
  pack.channels = channels;
  pack.runs = runs;
  pack.words = (channels / runs + kWordBits - 1) / kWordBits;
}

Pack make_pack(const Array& x, const Array& scales, const char* scales_name, int64_t runs) {
  require_array<float>("x", x, "N, C, H, W", {-1, -1, -1, -1});
  const float* scale_data = dense<const float>(scales_name, scales, "N, planes", {dim(x, 0), -1});
  const int64_t planes = dim(scales, 1);
  require(1 <= planes && planes <= kMaxPlanes, scales_name, " must hold 1 to ", kMaxPlanes, " scales, got ",
          planes);
  Pack pack{};
  set_runs(pack, dim(x, 1), runs);
  pack.x = static_cast<const float*>(x.data());
  pack.images = dim(x, 0);
  pack.height = dim(x, 2);
  pack.width = dim(x, 3);
  pack.stride_image = x.stride(0);
  pack.stride_channel = x.stride(1);
  pack.stride_y = x.stride(2);
  pack.stride_x = x.stride(3);
  pack.scales = scale_data;
  pack.planes = static_cast<int>(planes);
  return pack;
}

// All that the weights and the geometry say.
void set_weights(Conv& conv, const Array& w, const Pair& stride, const Pair& padding, const Pair& dilation,
                 int64_t channels, int64_t out_channels) {
  require_pair("stride", stride, 1);
  require_pair("padding", padding, 0);
  require_pair("dilation", dilation, 1);
  conv.weights = dense<const uint32_t>("w", w, kWeightAxes, {-1, -1, -1, -1, -1, -1, -1, kLanes});
  conv.weight_planes = static_cast<int>(dim(w, 0));
  conv.groups = dim(w, 1);
  conv.blocks = dim(w, 2);
  conv.segments = dim(w, 3);
  conv.kernel_h = dim(w, 4);
  conv.kernel_w = dim(w, 5);
  conv.words = dim(w, 6);
  require(1 <= dim(w, 0) && dim(w, 0) <= kMaxPlanes, "w must hold 1 to ", kMaxPlanes, " planes, got ",
          dim(w, 0));
  require(w.size() > 0, "w must not be empty, got shape ", show(shape_of(w)));
  require(conv.words == (channels + kWordBits - 1) / kWordBits, "w has ", conv.words, " words a tap, but ",
          channels, " input channels a segment take ", (channels + kWordBits - 1) / kWordBits);
  require(out_channels >= 1 && out_channels % conv.groups == 0, "out channels must be a multiple of the ",
          conv.groups, " groups, got ", out_channels);
  require(conv.blocks == (out_channels / conv.groups + kLanes - 1) / kLanes, "w has ", conv.blocks,
          " blocks a group, but ", out_channels, " out channels in ", conv.groups, " groups take ",
          (out_channels / conv.groups + kLanes - 1) / kLanes);
  require(conv.kernel_h <= INT32_MAX / conv.kernel_w / channels, "a window of ", conv.kernel_h, " x ",
          conv.kernel_w, " x ", channels, " values does not fit 32-bit integers");
  conv.stride_h = stride.first;
  conv.stride_w = stride.second;
  conv.pad_top = padding.first;
  conv.pad_left = padding.second;
  conv.dilation_h = dilation.first;
  conv.dilation_w = dilation.second;
  conv.channels = channels;
  conv.out_channels = out_channels;
}

// Thresholds and flips for the values of a pack, if given: both or none.
void set_thresholds(Pack& pack, const OptionalArray& thresholds, const OptionalArray& flips) {
  require(thresholds.has_value() == flips.has_value(), "thresholds and flips go together");
  if (!thresholds) return;
  require(pack.planes <= kMaxThresholdPlanes, "thresholds serve 1 to ", kMaxThresholdPlanes, " planes, got ",
          pack.planes);
  pack.thresholds =
      dense<const float>("thresholds", *thresholds, "2^planes - 1, groups * segments, 32 * words",
                         {(int64_t(1) << pack.planes) - 1, pack.runs, pack.words * kWordBits});
  pack.flips =
      dense<const uint32_t>("flips", *flips, "groups * segments, words", {pack.runs, pack.words});
}

nb::object pack_activation_py(const Array& x, const Array& scales, int64_t groups, int64_t segments,
                              int threads, const OptionalArray& thresholds, const OptionalArray& flips) {
  require(groups >= 1 && segments >= 1, "groups and segments must be at least 1, got ", groups, " and ",
          segments);
  require(threads >= 1, "threads must be at least 1, got ", threads);
  Pack pack = make_pack(x, scales, "scales", groups * segments);
  set_thresholds(pack, thresholds, flips);
  NewArray<uint32_t> out({pack.planes, pack.images, pack.height, pack.width, pack.runs, pack.words});
  pack.out = out.memory.get();
  {
    nb::gil_scoped_release release;
    pack_activation(pack, threads);
  }
  return out.release();
}

nb::object conv_integers_py(const Array& a, const Array& w, Pair stride, Pair padding, Pair dilation,
                            Pair out_size, int64_t in_channels_per_segment, int64_t out_channels,
                            int threads) {
  require(threads >= 1, "threads must be at least 1, got ", threads);
  require(in_channels_per_segment >= 1, "in_channels_per_segment must be at least 1, got ",
          in_channels_per_segment);
  require_pair("out_size", out_size, 0);
  Conv conv{};
  set_weights(conv, w, stride, padding, dilation, in_channels_per_segment, out_channels);
  conv.out_height = out_size.first;
  conv.out_width = out_size.second;
  conv.activations = dense<const uint32_t>("a", a, "planes, N, H, W, groups * segments, words",
                                           {-1, -1, -1, -1, conv.groups * conv.segments, conv.words});
  require(1 <= dim(a, 0) && dim(a, 0) <= kMaxPlanes, "a must hold 1 to ", kMaxPlanes, " planes, got ",
          dim(a, 0));
  conv.activation_planes = static_cast<int>(dim(a, 0));
  conv.images = dim(a, 1);
  conv.height = dim(a, 2);
  conv.width = dim(a, 3);
  conv.activation_plane = conv.images * conv.height * conv.width * conv.groups * conv.segments * conv.words;
  NewArray<int32_t> out({conv.weight_planes, conv.activation_planes, conv.segments, conv.images,
                         conv.out_height, conv.out_width, conv.out_channels});
  conv.integers = out.memory.get();
  {
    nb::gil_scoped_release release;
    conv_integers(conv, threads);
  }
  return out.release();
}

// A convolution whose constants are checked once, for layers that run it again and again: small ones would
// otherwise spend their time on looking at arrays. Holds the arrays, so that their memory stays; of a depthwise one's
// words and thresholds it uses a copy.
class PreparedConv {
 public:
  PreparedConv(const Array& w, const Array& weight_scales, const OptionalArray& bias, Pair stride,
               Pair padding, Pair dilation, const OptionalArray& thresholds, const OptionalArray& flips,
               const OptionalArray& slopes, int activation_planes, int64_t in_channels)
      : held_{w, weight_scales} {
    require(1 <= activation_planes && activation_planes <= kMaxPlanes, "an activation takes 1 to ", kMaxPlanes,
            " scales, got ", activation_planes);
    require_array<uint32_t>("w", w, kWeightAxes, {-1, -1, -1, -1, -1, -1, -1, kLanes});
    require_array<float>("weight_scales", weight_scales, "planes, out channels, segments",
                         {dim(w, 0), -1, dim(w, 3)});
    const int64_t out_channels = dim(weight_scales, 1);
    set_runs(pack_, in_channels, dim(w, 1) * dim(w, 3));
    pack_.planes = activation_planes;
    set_thresholds(pack_, thresholds, flips);
    set_weights(conv_, w, stride, padding, dilation, in_channels / pack_.runs, out_channels);
    conv_.activation_planes = activation_planes;
    weight_scales_ = dense<const float>("weight_scales", weight_scales, "planes, out channels, segments",
                                        {conv_.weight_planes, out_channels, conv_.segments});
    bias_ = bias ? dense<const float>("bias", *bias, "out channels", {out_channels}) : nullptr;
    slopes_ = slopes ? dense<const float>("slopes", *slopes, "out channels", {out_channels}) : nullptr;
    for (const OptionalArray& array : {bias, thresholds, flips, slopes})
      if (array) held_.push_back(*array);
    if (is_depthwise(conv_)) depthwise_.take(pack_, conv_);
  }
  PreparedConv(const PreparedConv&) = delete;  // pack_ and conv_ may point into depthwise_
  PreparedConv& operator=(const PreparedConv&) = delete;

  int64_t out_channels() const { return conv_.out_channels; }
  int activation_planes() const { return pack_.planes; }

  // What an input brings along: sizes and strides of [N, C, H, W], and the output's [N, OH, OW, out channels].
  struct Input {
    const float* x;
    std::array<int64_t, 4> shape, strides;
    const float* scales;  // [N, planes], or [planes] for all images
    bool scales_by_image;
    const float* residual;  // like out, or null
    float* out;
    Pair out_size;
  };

  void run(const Input& input, int threads) const {
    require(threads >= 1, "threads must be at least 1, got ", threads);
    require_pair("out_size", input.out_size, 0);
    require(input.shape[1] == pack_.channels, "x must have ", pack_.channels, " channels, got ",
            input.shape[1]);
    Pack pack = pack_;
    Conv conv = conv_;
    pack.x = input.x;
    pack.images = conv.images = input.shape[0];
    pack.height = conv.height = input.shape[2];
    pack.width = conv.width = input.shape[3];
    pack.stride_image = input.strides[0];
    pack.stride_channel = input.strides[1];
    pack.stride_y = input.strides[2];
    pack.stride_x = input.strides[3];
    pack.scales = input.scales;
    conv.out = input.out;
    conv.residual = input.residual;
    conv.out_height = input.out_size.first;
    conv.out_width = input.out_size.second;
    std::vector<float> repeated;
    if (!input.scales_by_image && pack.images > 1) {
      for (int64_t image = 0; image < pack.images; ++image)
        repeated.insert(repeated.end(), input.scales, input.scales + pack.planes);
      pack.scales = repeated.data();
    }
    conv_fused(pack, conv, weight_scales_, bias_, slopes_, threads);
  }

  // The same for memory that the caller vouches for, addresses of float32, dense but for x; and with no more threads
  // than have enough to do.
  void run_at(uintptr_t x, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
              uintptr_t scales, bool scales_by_image, uintptr_t residual, uintptr_t out, Pair out_size,
              int threads) const {
    require(threads >= 1, "threads must be at least 1, got ", threads);
    threads = useful_threads(conv_, shape[0] * out_size.first * out_size.second, threads);
    run({reinterpret_cast<const float*>(x), shape, strides, reinterpret_cast<const float*>(scales),
         scales_by_image, reinterpret_cast<const float*>(residual), reinterpret_cast<float*>(out), out_size},
        threads);
  }

 private:
  std::vector<Array> held_;
  Pack pack_{};
  Conv conv_{};
  Depthwise depthwise_;
  const float* weight_scales_;
  const float* bias_;
  const float* slopes_;
};

nb::object conv_py(const Array& x, const Array& w, const Array& weight_scales, const Array& activation_scales,
                   const OptionalArray& bias, Pair stride, Pair padding, Pair dilation, Pair out_size,
                   const OptionalArray& thresholds, const OptionalArray& flips, const OptionalArray& slopes,
                   const OptionalArray& residual, nb::object out, int threads) {
  require_array<float>("x", x, "N, C, H, W", {-1, -1, -1, -1});
  const float* scales = dense<const float>("activation_scales", activation_scales, "N, planes", {dim(x, 0), -1});
  const PreparedConv conv(w, weight_scales, bias, stride, padding, dilation, thresholds, flips, slopes,
                          static_cast<int>(dim(activation_scales, 1)), dim(x, 1));
  const Shape out_shape = {dim(x, 0), out_size.first, out_size.second, conv.out_channels()};
  PreparedConv::Input input{static_cast<const float*>(x.data()), {}, {}, scales, true, nullptr, nullptr, out_size};
  for (size_t i = 0; i < 4; ++i) {
    input.shape[i] = dim(x, i);
    input.strides[i] = x.stride(i);
  }
  if (residual)
    input.residual = dense<const float>("residual", *residual, "N, OH, OW, out channels", out_shape);
  require_pair("out_size", out_size, 0);
  std::optional<NewArray<float>> fresh;
  nb::ndarray<> given;
  if (out.is_none()) {
    input.out = fresh.emplace(out_shape).memory.get();
  } else {
    require(nb::try_cast(out, given, false), "out must be a writable array");
    input.out = dense<float>("out", given, "N, OH, OW, out channels", out_shape);
  }
  {
    nb::gil_scoped_release release;
    conv.run(input, threads);
  }
  return fresh ? fresh->release() : out;
}

}  // namespace

void bind_conv(nb::module_& m) {
  m.def("pack_activation", &pack_activation_py, "x"_a.noconvert(), "scales"_a.noconvert(), "groups"_a = 1,
        "segments"_a = 1, "threads"_a = 1, "thresholds"_a.noconvert().none() = nb::none(),
        "flips"_a.noconvert().none() = nb::none());
  m.def("conv_integers", &conv_integers_py, "a"_a.noconvert(), "w"_a.noconvert(), nb::kw_only(),
        "stride"_a = Pair(1, 1), "padding"_a = Pair(0, 0), "dilation"_a = Pair(1, 1), "out_size"_a,
        "in_channels_per_segment"_a, "out_channels"_a, "threads"_a = 1);
  m.def("conv", &conv_py, "x"_a.noconvert(), "w"_a.noconvert(), "weight_scales"_a.noconvert(),
        "activation_scales"_a.noconvert(), "bias"_a.noconvert().none() = nb::none(), nb::kw_only(),
        "stride"_a = Pair(1, 1), "padding"_a = Pair(0, 0), "dilation"_a = Pair(1, 1), "out_size"_a,
        "thresholds"_a.noconvert().none() = nb::none(), "flips"_a.noconvert().none() = nb::none(),
        "slopes"_a.noconvert().none() = nb::none(), "residual"_a.noconvert().none() = nb::none(),
        "out"_a.none() = nb::none(), "threads"_a = 1);
  nb::class_<PreparedConv>(m, "PreparedConv")
      .def(nb::init<const Array&, const Array&, const OptionalArray&, Pair, Pair, Pair, const OptionalArray&,
                    const OptionalArray&, const OptionalArray&, int, int64_t>(),
           "w"_a.noconvert(), "weight_scales"_a.noconvert(), "bias"_a.noconvert().none(), nb::kw_only(),
           "stride"_a, "padding"_a, "dilation"_a, "thresholds"_a.noconvert().none(),
           "flips"_a.noconvert().none(), "slopes"_a.noconvert().none(), "activation_planes"_a, "in_channels"_a)
      .def_prop_ro("activation_planes", &PreparedConv::activation_planes)
      .def("run_at", &PreparedConv::run_at, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace foldbit
