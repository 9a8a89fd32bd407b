// Plain C++ for any machine. Loops over the lanes, which compilers turn into whatever vectors the baseline
// CPU has; bits are counted by adding neighbours, and the counts stay in bytes while they fit.

#include "kernel_conv.h"
#include "kernel_depthwise.h"
#include "kernel_fold.h"
#include "kernel_pack.h"

namespace foldbit {
namespace {

struct OwnBits {  // a table, for baseline CPUs cannot shift lanes by different amounts
  uint32_t of[kWordBits];

  constexpr OwnBits() : of() {
    for (int i = 0; i < kWordBits; ++i) of[i] = 1u << i;
  }
};

constexpr OwnBits kOwnBits;

struct Portable {
  struct Words {
    uint32_t lane[kLanes];
  };
  using Counts = Words;
  struct Ints {
    int32_t lane[kLanes];
  };
  struct Floats {
    float lane[kLanes];
  };
  static constexpr int kRoom = 31;  // a byte counts up to 8 bits a call: 31 * 8 < 256
  static constexpr int kBlocks = 1;
  static constexpr int kAccumulators = 1;  // four of a baseline x86-64's 16 vector registers

  static Words no_words() { return {}; }
  static Words load(const uint32_t* p) {
    Words w;
    memcpy(w.lane, p, sizeof w.lane);
    return w;
  }
  static Words broadcast(uint32_t word) {
    Words w;
    for (uint32_t& lane : w.lane) lane = word;
    return w;
  }
  static void store(uint32_t* p, const Words& w) { memcpy(p, w.lane, sizeof w.lane); }

  static Counts no_counts() { return {}; }
  static Counts count(Counts c, const Words& a, const Words& w) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t v = a.lane[i] ^ w.lane[i];
      v -= (v >> 1) & 0x55555555u;                       // counts in pairs of bits
      v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);  // in nibbles
      c.lane[i] += (v + (v >> 4)) & 0x0f0f0f0fu;         // in bytes
    }
    return c;
  }

  static Ints no_ints() { return {}; }
  static Ints widen(Ints sum, const Counts& c) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t halves = (c.lane[i] & 0x00ff00ffu) + ((c.lane[i] >> 8) & 0x00ff00ffu);
      sum.lane[i] += static_cast<int32_t>((halves & 0xffffu) + (halves >> 16));
    }
    return sum;
  }
  static Ints matches(int32_t k, Ints c) {
    for (int32_t& lane : c.lane) lane = k - 2 * lane;
    return c;
  }
  static void store(int32_t* p, const Ints& i) { memcpy(p, i.lane, sizeof i.lane); }
  static Floats to_float(const Ints& i) {
    Floats f;
    for (int l = 0; l < kLanes; ++l) f.lane[l] = static_cast<float>(i.lane[l]);
    return f;
  }

  struct Marks {
    int32_t lane[2 * kLanes];
  };
  static constexpr int kMarks = 1;
  static Marks no_marks() { return {}; }
  static Marks count_marks(Marks m, uint32_t a, uint32_t w) {
    for (int i = 0; i < 2 * kLanes; ++i) m.lane[i] += ((a ^ w) & kOwnBits.of[i]) != 0;
    return m;
  }
  static Ints marks_of(const Marks& m, int half) {
    Ints i;
    memcpy(i.lane, m.lane + half * kLanes, sizeof i.lane);
    return i;
  }

  static Floats load(const float* p) {
    Floats f;
    memcpy(f.lane, p, sizeof f.lane);
    return f;
  }
  static Floats broadcast(float value) {
    Floats f;
    for (float& lane : f.lane) lane = value;
    return f;
  }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Floats mul(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static void store(float* p, const Floats& f) { memcpy(p, f.lane, sizeof f.lane); }
  static Floats at_least(Floats x, const Floats& low) {
    for (int i = 0; i < kLanes; ++i) x.lane[i] = x.lane[i] < low.lane[i] ? low.lane[i] : x.lane[i];
    return x;
  }
  static Floats leaky(Floats x, const Floats& slope) {
    for (int i = 0; i < kLanes; ++i) x.lane[i] = x.lane[i] < 0 ? x.lane[i] * slope.lane[i] : x.lane[i];
    return x;
  }

  static uint32_t negative(const Floats& r) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(r.lane[i] < 0) << i;
    return bits;
  }
  static uint32_t below(const Floats& x, const Floats& t) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(x.lane[i] < t.lane[i]) << i;
    return bits;
  }
  static uint32_t below(const Floats& x0, const Floats& x1, const Floats& t0, const Floats& t1) {
    return below(x0, t0) | below(x1, t1) << kLanes;
  }
  static Floats residual(Floats r, const Floats& v) {
    for (int i = 0; i < kLanes; ++i) r.lane[i] -= r.lane[i] < 0 ? -v.lane[i] : v.lane[i];
    return r;
  }
  static Words mark(Words w, const Floats& r, uint32_t bit) {
    for (int i = 0; i < kLanes; ++i) w.lane[i] |= r.lane[i] < 0 ? bit : 0;
    return w;
  }
  static Words mark_lanes(Words w, uint32_t lanes, uint32_t bit) {
    for (int i = 0; i < kLanes; ++i) w.lane[i] |= lanes >> i & 1 ? bit : 0;
    return w;
  }
};

}  // namespace

const Kernels portable_kernels = {
    "portable", 0, pack_row<Portable>, conv_piece<Portable>, depthwise_piece<Portable>, kRowPixels, Portable::kBlocks,
    row_kernels<float>(), row_kernels<double>()};

}  // namespace foldbit
