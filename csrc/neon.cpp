// NEON, which every 64-bit ARM has: popcount of bytes in one instruction, and the counts stay in bytes while they
// fit.

#include <arm_neon.h>

#include "kernel_conv.h"
#include "kernel_depthwise.h"
#include "kernel_fold.h"
#include "kernel_pack.h"

namespace foldbit {
namespace {

struct Neon {
  struct Words {
    uint32x4_t part[4];
  };
  struct Counts {
    uint8x16_t part[4];
  };
  struct Ints {
    int32x4_t part[4];
  };
  struct Floats {
    float32x4_t part[4];
  };
  static constexpr int kRoom = 31;  // a byte counts up to 8 bits a call: 31 * 8 < 256
  static constexpr int kBlocks = 1;
  static constexpr int kAccumulators = 4;  // of 4 registers each, of 32

  static Words no_words() { return broadcast(uint32_t(0)); }
  static Words load(const uint32_t* p) {
    return {{vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}};
  }
  static Words broadcast(uint32_t word) {
    const uint32x4_t v = vdupq_n_u32(word);
    return {{v, v, v, v}};
  }
  static void store(uint32_t* p, const Words& w) {
    for (int i = 0; i < 4; ++i) vst1q_u32(p + 4 * i, w.part[i]);
  }

  static Counts no_counts() {
    const uint8x16_t zero = vdupq_n_u8(0);
    return {{zero, zero, zero, zero}};
  }
  static Counts count(Counts c, const Words& a, const Words& w) {
    for (int i = 0; i < 4; ++i)
      c.part[i] = vaddq_u8(c.part[i], vcntq_u8(vreinterpretq_u8_u32(veorq_u32(a.part[i], w.part[i]))));
    return c;
  }

  static Ints no_ints() {
    const int32x4_t zero = vdupq_n_s32(0);
    return {{zero, zero, zero, zero}};
  }
  static Ints widen(Ints sum, const Counts& c) {
    for (int i = 0; i < 4; ++i)
      sum.part[i] = vaddq_s32(sum.part[i], vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(c.part[i]))));
    return sum;
  }
  static Ints matches(int32_t k, Ints c) {
    for (int32x4_t& part : c.part) part = vsubq_s32(vdupq_n_s32(k), vaddq_s32(part, part));
    return c;
  }
  static void store(int32_t* p, const Ints& v) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, v.part[i]);
  }
  static Floats to_float(const Ints& v) {
    return {{vcvtq_f32_s32(v.part[0]), vcvtq_f32_s32(v.part[1]), vcvtq_f32_s32(v.part[2]),
             vcvtq_f32_s32(v.part[3])}};
  }

  struct Marks {
    uint8x16_t half[2];
  };
  static constexpr int kMarks = 4;
  static Marks no_marks() { return {{vdupq_n_u8(0), vdupq_n_u8(0)}}; }
  static Marks count_marks(Marks m, uint32_t a, uint32_t w) {
    const uint8x16_t own = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t differ = vreinterpretq_u8_u32(vdupq_n_u32(a ^ w));
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t byte = vcombine_u8(vdup_n_u8(2 * i), vdup_n_u8(2 * i + 1));
      m.half[i] = vsubq_u8(m.half[i], vtstq_u8(vqtbl1q_u8(differ, byte), own));
    }
    return m;
  }
  static Ints marks_of(const Marks& m, int half) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(m.half[half])), high = vmovl_u8(vget_high_u8(m.half[half]));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
             vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
  }

  static Floats load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static Floats broadcast(float value) {
    const float32x4_t v = vdupq_n_f32(value);
    return {{v, v, v, v}};
  }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < 4; ++i) a.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return a;
  }
  static Floats mul(Floats a, const Floats& b) {
    for (int i = 0; i < 4; ++i) a.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return a;
  }
  static void store(float* p, const Floats& f) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.part[i]);
  }
  static Floats at_least(Floats x, const Floats& low) {
    for (int i = 0; i < 4; ++i) x.part[i] = vbslq_f32(vcltq_f32(x.part[i], low.part[i]), low.part[i], x.part[i]);
    return x;
  }
  static Floats leaky(Floats x, const Floats& slope) {
    for (int i = 0; i < 4; ++i)
      x.part[i] = vbslq_f32(vcltzq_f32(x.part[i]), vmulq_f32(x.part[i], slope.part[i]), x.part[i]);
    return x;
  }

  // A bit for each of 16 lanes that are all ones or all zeros.
  static uint32_t bits(const uint32x4_t (&lanes)[4]) {
    static const uint32_t own[4] = {1, 2, 4, 8};
    uint32_t all = 0;
    for (int i = 0; i < 4; ++i) all |= vaddvq_u32(vandq_u32(lanes[i], vld1q_u32(own))) << 4 * i;
    return all;
  }
  static uint32_t negative(const Floats& r) {
    const uint32x4_t lanes[4] = {vcltzq_f32(r.part[0]), vcltzq_f32(r.part[1]), vcltzq_f32(r.part[2]),
                                 vcltzq_f32(r.part[3])};
    return bits(lanes);
  }
  static uint32_t below(const Floats& x, const Floats& t) {
    const uint32x4_t lanes[4] = {vcltq_f32(x.part[0], t.part[0]), vcltq_f32(x.part[1], t.part[1]),
                                 vcltq_f32(x.part[2], t.part[2]), vcltq_f32(x.part[3], t.part[3])};
    return bits(lanes);
  }
  static uint32_t below(const Floats& x0, const Floats& x1, const Floats& t0, const Floats& t1) {
    return below(x0, t0) | below(x1, t1) << kLanes;
  }
  static Floats residual(Floats r, const Floats& v) {
    for (int i = 0; i < 4; ++i)
      r.part[i] = vsubq_f32(r.part[i], vbslq_f32(vcltzq_f32(r.part[i]), vnegq_f32(v.part[i]), v.part[i]));
    return r;
  }
  static Words mark(Words w, const Floats& r, uint32_t bit) {
    for (int i = 0; i < 4; ++i)
      w.part[i] = vorrq_u32(w.part[i], vandq_u32(vcltzq_f32(r.part[i]), vdupq_n_u32(bit)));
    return w;
  }
  static Words mark_lanes(Words w, uint32_t lanes, uint32_t bit) {
    static const uint32_t own[kLanes] = {1,      2,      4,      8,      1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                         1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    for (int i = 0; i < 4; ++i)
      w.part[i] = vorrq_u32(
          w.part[i], vandq_u32(vtstq_u32(vdupq_n_u32(lanes), vld1q_u32(own + 4 * i)), vdupq_n_u32(bit)));
    return w;
  }
};

}  // namespace

const Kernels neon_kernels = {
    "neon", 0, pack_row<Neon>, conv_piece<Neon>, depthwise_piece<Neon>, kRowPixels, Neon::kBlocks,
    row_kernels<float>(), row_kernels<double>()};

}  // namespace foldbit
