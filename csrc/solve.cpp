// How a row is solved.
//
// Both schemes give the smaller magnitudes of a row one level and the larger ones another, so a solution is a
// split of the sorted magnitudes: m of the n are low, and add up to `low`. With S the sum of all, the squared
// error that a split saves is its gain P²/Q, where
//
//   ls-2 (saves it over one level, the mean, for all)   P = m·S/n - low    Q = m·(n - m)/n
//   ls-T (saves it over zero for all)                   P = S - low        Q = n - m
//
// Sorting would be the slow part, and nearly all of it can be left out. A histogram of |x| gives the gain
// exactly at the edges between bins, and bounds it inside a bin: let the bin hold c magnitudes in [lo, hi] that
// add up to s. The j smallest of them add up to at least j·lo, and to at least s - (c - j)·hi. Either makes P
// at most a linear function of j, and Q is positive and concave, so the gain it allows is convex in j and
// largest at an end. The first bound is the lower one before, the second after the knee where the two meet,
//
//   j = (c·hi - s) / (hi - lo),
//
// so no split in the bin gains more than its edges or its knee promise. Only bins whose knee promises more than
// the best edge has can hide a better split. They are few and small: their magnitudes are gathered and searched
// in the same way, down to handfuls that are ranked. What the bins not opened still promise over the best
// split is the certificate.

#include "solve.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "foldbit.h"
#include "rows.h"
#include "threads.h"

namespace foldbit {
namespace {

// The two objectives.

struct TwoPlanes {
  TwoPlanes(double n, double total) : n(n), share(1 / n), mean(total / n) {}
  double p(double m, double low) const { return m * mean - low; }
  double q(double m) const { return m * (n - m) * share; }

  const double n, share, mean;
};

struct Ternary {
  Ternary(double n, double total) : n(n), total(total) {}
  double p(double, double low) const { return total - low; }
  double q(double m) const { return n - m; }

  const double n, total;
};

// A split, and its gain as P² and Q: most comparisons then need no division.
struct Split {
  double m, low;
  double p_squared, q;

  bool worse_than(double other_p_squared, double other_q) const {
    return other_p_squared * q > p_squared * other_q;
  }
  double gain() const { return p_squared / q; }
};

// |x| clipped to the limit; NaN stays NaN.
template <class T>
T clipped(T value, T limit) {
  const T magnitude = std::fabs(value);
  return limit < magnitude ? limit : magnitude;
}

template <class T>
Summary<T> summarize(const T* x, size_t n, T limit) {
  return current_row_kernels<T>().summarize(x, static_cast<int64_t>(n), limit);
}

// A row in chunks that threads share. Where they lie depends on its length alone, and their sums are added in
// order, so the numbers do not depend on the threads. Not more chunks than this: each keeps a histogram.
class Chunks {
 public:
  explicit Chunks(size_t n) : n_(n), count_(std::min(kMost, std::max<size_t>(1, n / kShortest))) {}

  size_t count() const { return count_; }
  size_t begin(size_t chunk) const { return n_ / count_ * chunk + std::min(chunk, n_ % count_); }
  size_t length(size_t chunk) const { return begin(chunk + 1) - begin(chunk); }

  // Call body(chunk) for each.
  template <class Body>
  void share(int threads, const Body& body) const {
    parallel_for(static_cast<int64_t>(count_), threads, [&](int64_t chunk) { body(static_cast<size_t>(chunk)); });
  }

 private:
  static constexpr size_t kShortest = size_t(1) << 16, kMost = 16;

  size_t n_, count_;
};

template <class T>
Summary<T> summarize(const T* x, const Chunks& chunks, T limit, int threads) {
  if (chunks.count() == 1) return summarize(x, chunks.length(0), limit);
  std::vector<Summary<T>> parts(chunks.count());
  chunks.share(threads, [&](size_t c) { parts[c] = summarize(x + chunks.begin(c), chunks.length(c), limit); });
  Summary<T> all = parts[0];
  for (size_t c = 1; c < chunks.count(); ++c) {
    all.sum += parts[c].sum;
    all.lowest = std::min(all.lowest, parts[c].lowest);
    all.highest = std::max(all.highest, parts[c].highest);
  }
  return all;
}

// Equal bins from the lowest magnitude up, and a last one for all that lies beyond them.
template <class T>
class Grid {
 public:
  Grid(const Summary<T>& summary, size_t n, size_t equal_bins, T limit)
      : ruler_{summary.lowest, T(1), static_cast<T>(equal_bins)}, highest_(summary.highest), limit_(limit) {
    // Six times the mean holds all but a little of most data, and at least five sixths of any. Equal bins up to
    // the end of a heavy tail would put all the rest in one of them.
    const double full = double(highest_) - lowest(), mean = summary.sum / double(n) - lowest();
    const double covered = std::min(full, std::max(6 * mean, full / double(n)));
    const double bins_per_unit = double(equal_bins) / covered;
    usable_ = bins_per_unit < double(std::numeric_limits<T>::max());
    if (usable_) ruler_.per_unit = static_cast<T>(bins_per_unit);
    width_ = 1 / double(ruler_.per_unit);
  }

  // Not for float32 magnitudes so close together, 1e-35 or less, that the inverse overflows.
  bool usable() const { return usable_; }
  size_t bins() const { return static_cast<size_t>(ruler_.last) + 1; }

  // The bins of n values.
  void find(const T* x, size_t n, int32_t* bins) const {
    kernels_.places(x, static_cast<int64_t>(n), ruler_, limit_, bins);
  }

  // Bounds of the magnitudes in a bin. The roundings in find() are smaller than the slack.
  double lower(size_t bin) const { return lowest() + double(bin) * width_ * (1 - kSlack); }
  double upper(size_t bin) const {
    if (bin + 1 == bins()) return double(highest_);
    return std::min(double(highest_), lowest() + double(bin + 1) * width_ * (1 + kSlack));
  }

 private:
  static constexpr double kSlack = 4 * double(std::numeric_limits<T>::epsilon());

  double lowest() const { return double(ruler_.lowest); }

  const RowKernels<T>& kernels_ = current_row_kernels<T>();
  Ruler<T> ruler_;
  T highest_, limit_;
  double width_;
  bool usable_;
};

struct Bin {
  double sum, count;  // both double: one 16-byte vector holds them

  void add(double magnitude) {
    sum += magnitude;
    count += 1;
  }
  void add(const Bin& other) {
    sum += other.sum;
    count += other.count;
  }
};

// A bin that may hide a better split: how much it holds, what lies below it, and the gain it promises.
struct Candidate {
  size_t bin, count;
  double m, low;
  double p_squared, q;
};

// Buffers that a thread keeps from row to row.
template <class T>
struct Scratch {
  static constexpr int kLevels = 4;  // of histograms of bins of histograms; what is then left is sorted
  static constexpr size_t kKeptBytes = size_t(1) << 18;

  std::vector<Bin> bins;    // first those of the whole stretch, then, if it has several, those of its chunks
  std::vector<Bin> copies;  // see fill_bins
  std::vector<T*> ends;     // a bin: where its next gathered magnitude goes, or null if it is no candidate
  std::vector<Candidate> candidates[kLevels];
  std::vector<T> gathered[kLevels];
  std::vector<T> sorted, rescaled;

  // Keep no buffer that an unusual row made large.
  void trim() {
    for (std::vector<T>& buffer : gathered) trim(buffer);
    trim(sorted);
    trim(rescaled);
  }
  static void trim(std::vector<T>& buffer) {
    if (buffer.capacity() * sizeof(T) > kKeptBytes) std::vector<T>().swap(buffer);
  }
};

// Measured on rows of 9 to 200,000: fewer magnitudes are ranked faster, this many a bin balance filling and
// scanning the bins against searching inside them, and more bins would leave the nearest caches.
constexpr size_t kRankAtMost = 64;
constexpr size_t kMagnitudesPerBin = 12;
constexpr size_t kMaxBins = 1024;

template <class T>
Scratch<T>& own_scratch() {
  thread_local Scratch<T> scratch;
  return scratch;
}

// Searches the splits of one row for the best.
template <class Objective, class T>
class Search {
 public:
  Search(Objective objective, Split first, double tolerated_gain, T limit, int threads, Scratch<T>& scratch)
      : objective_(objective),
        best_(first),
        tolerated_gain_(tolerated_gain),
        limit_(limit),
        threads_(threads),
        scratch_(scratch) {}

  void row(const T* x, size_t n, const Summary<T>& summary) {
    if (n <= kRankAtMost) return by_rank(x, n, 0, 0);
    by_histogram(x, n, summary, 0, 0, 0);
  }

  const Split& best() const { return best_; }

  // What the bins not opened may gain over the best split.
  double missed_gain() const { return std::max(0.0, unopened_gain_ - best_.gain()); }

 private:
  // The searches below try every split inside a stretch of the sorted row. They get its magnitudes, |x[0..n)|,
  // in any order, and what lies below the stretch: m magnitudes that add up to `low`.

  void stretch(const T* x, size_t n, double m, double low, int level) {
    if (n <= kRankAtMost) return by_rank(x, n, m, low);
    const Summary<T> summary = summarize(x, n, limit_);
    if (summary.lowest == summary.highest) return;  // no split among equals beats both ends
    if (level == Scratch<T>::kLevels) return by_sorting(x, n, m, low);
    by_histogram(x, n, summary, m, low, level);
  }

  void by_histogram(const T* x, size_t n, const Summary<T>& summary, double m, double low, int level) {
    const Grid<T> grid(summary, n, std::min(kMaxBins, std::max<size_t>(16, n / kMagnitudesPerBin)), limit_);
    if (!grid.usable()) return by_sorting(x, n, m, low);
    const Chunks chunks(n);
    fill_bins(grid, x, chunks);
    try_edges(grid.bins(), m, low);

    std::vector<Candidate>& candidates = scratch_.candidates[level];
    const size_t total = find_candidates(grid, m, low, candidates);
    if (candidates.empty()) return;
    std::vector<T>& gathered = scratch_.gathered[level];
    if (gathered.size() < total) gathered.resize(total);
    gather(grid, x, chunks, candidates, gathered.data());

    const T* inside = gathered.data();
    for (const Candidate& candidate : candidates) {
      // The candidates before it may have raised the best above its promise.
      if (worth_opening(candidate.p_squared, candidate.q)) {
        stretch(inside, candidate.count, candidate.m, candidate.low, level + 1);
      }
      inside += candidate.count;
    }
  }

  // A magnitude's rank is the number of smaller ones. Here each rank is a bin, which equal magnitudes share.
  void by_rank(const T* x, size_t n, double m, double low) {
    constexpr size_t kWhole = 16;  // for whole vectors, filled up with what is never the smaller
    static_assert(kRankAtMost % kWhole == 0);
    T magnitudes[kRankAtMost];
    const size_t padded = (n + kWhole - 1) / kWhole * kWhole;
    for (size_t i = 0; i < n; ++i) magnitudes[i] = clipped(x[i], limit_);
    std::fill(magnitudes + n, magnitudes + padded, std::numeric_limits<T>::infinity());

    scratch_.bins.assign(n, Bin{0, 0});
    for (size_t i = 0; i < n; ++i) {
      int32_t rank = 0;
      for (size_t j = 0; j < padded; ++j) rank += magnitudes[j] < magnitudes[i];
      scratch_.bins[static_cast<size_t>(rank)].add(magnitudes[i]);
    }
    try_edges(n, m, low);
  }

  void by_sorting(const T* x, size_t n, double m, double low) {
    std::vector<T>& sorted = scratch_.sorted;
    sorted.resize(n);
    std::transform(x, x + n, sorted.begin(), [this](T value) { return clipped(value, limit_); });
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; i + 1 < n; ++i) {
      m += 1;
      low += sorted[i];
      try_split(best_, m, low);
    }
  }

  void fill_bins(const Grid<T>& grid, const T* x, const Chunks& chunks) {
    const size_t bins = grid.bins();
    if (chunks.count() == 1) {
      scratch_.bins.resize(bins);
      return fill_bins(grid, x, chunks.length(0), scratch_, scratch_.bins.data());
    }
    scratch_.bins.resize(bins * (1 + chunks.count()));
    Bin* const table = scratch_.bins.data();
    chunks.share(threads_, [&](size_t c) {
      fill_bins(grid, x + chunks.begin(c), chunks.length(c), own_scratch<T>(), table + bins * (1 + c));
    });
    for (size_t b = 0; b < bins; ++b) {
      Bin all{0, 0};
      for (size_t c = 1; c <= chunks.count(); ++c) all.add(table[bins * c + b]);
      table[b] = all;
    }
  }

  void fill_bins(const Grid<T>& grid, const T* x, size_t n, Scratch<T>& scratch, Bin* table) const {
    // Equal magnitudes, zeros say, would make each addition to their bin wait for the one before. So neighbours
    // add to different copies of the bin.
    constexpr size_t kCopies = 4;
    const size_t bins = grid.bins();
    scratch.copies.assign(bins * kCopies, Bin{0, 0});
    Bin* const copies = scratch.copies.data();
    for_each_block(grid, x, n, [copies, limit = limit_](const T* values, const int32_t* bin, size_t length) {
      const auto add = [=](size_t i, size_t copy) {
        copies[static_cast<size_t>(bin[i]) * kCopies + copy].add(clipped(values[i], limit));
      };
      size_t i = 0;
      for (; i + kCopies <= length; i += kCopies) {
        for (size_t copy = 0; copy < kCopies; ++copy) add(i + copy, copy);
      }
      for (; i < length; ++i) add(i, 0);
    });
    for (size_t b = 0; b < bins; ++b) {
      Bin all = copies[b * kCopies];
      for (size_t copy = 1; copy < kCopies; ++copy) all.add(copies[b * kCopies + copy]);
      table[b] = all;
    }
  }

  // Try the splits between bins. The two ends of the stretch are no business of ours: they are edges of the bin
  // it came from, or the ends of the row.
  void try_edges(size_t bins, double m, double low) {
    const Bin* const table = scratch_.bins.data();
    while (table[bins - 1].count == 0) --bins;
    Split best = best_;
    for (size_t b = 0; b + 1 < bins; ++b) {
      m += table[b].count;
      low += table[b].sum;
      try_split(best, m, low);
    }
    best_ = best;
  }

  // Returns how many magnitudes the candidates hold.
  size_t find_candidates(const Grid<T>& grid, double m, double low, std::vector<Candidate>& candidates) {
    candidates.clear();
    size_t total = 0;
    const double gain = best_.gain();
    const Bin* const table = scratch_.bins.data();
    const size_t bins = grid.bins();
    for (size_t b = 0; b < bins; ++b) {
      const Bin bin = table[b];
      const double lower = grid.lower(b), upper = grid.upper(b);
      const double knee = (bin.count * upper - bin.sum) / (upper - lower);
      const double j = std::max(0.0, std::min(bin.count, knee));
      const double p = objective_.p(m + j, low + j * lower), q = objective_.q(m + j);
      const bool splits = bin.count >= 2 && lower < upper;  // the knee of other bins may be anything, NaN too
      if (splits && p > 0 && p * p > gain * q && worth_opening(p * p, q)) {
        const size_t count = static_cast<size_t>(bin.count);
        candidates.push_back({b, count, m, low, p * p, q});
        total += count;
      }
      m += bin.count;
      low += bin.sum;
    }
    return total;
  }

  // Copy the candidates' magnitudes to `out`, one candidate after the other.
  void gather(const Grid<T>& grid, const T* x, const Chunks& chunks, const std::vector<Candidate>& candidates,
              T* out) const {
    // A chunk's magnitudes go behind those of the chunks before it: all know from their histograms where.
    const size_t bins = grid.bins();
    const Bin* const table = scratch_.bins.data();
    const auto start = [&](size_t chunk, T** ends) {
      T* next = out;
      for (const Candidate& candidate : candidates) {
        ends[candidate.bin] = next;
        for (size_t c = 1; c <= chunk; ++c) {
          ends[candidate.bin] += static_cast<size_t>(table[bins * c + candidate.bin].count);
        }
        next += candidate.count;
      }
    };
    chunks.share(threads_, [&](size_t c) {
      std::vector<T*>& ends = own_scratch<T>().ends;
      ends.assign(bins, nullptr);
      start(c, ends.data());
      gather(grid, x + chunks.begin(c), chunks.length(c), candidates, ends.data());
    });
  }

  void gather(const Grid<T>& grid, const T* x, size_t n, const std::vector<Candidate>& candidates,
              T** const ends) const {
    const int32_t first = static_cast<int32_t>(candidates.front().bin);
    const int32_t last = static_cast<int32_t>(candidates.back().bin);
    for_each_block(grid, x, n, [=, limit = limit_](const T* values, const int32_t* bin, size_t length) {
      const auto in_reach = [=](size_t i) { return int32_t(first <= bin[i]) & int32_t(bin[i] <= last); };
      // Most runs of a long row hold no candidate's magnitude, which a vectorized loop sees. Where in a run one
      // is cannot be predicted, so the loop that finds it does not branch.
      constexpr size_t kRun = 32;
      for (size_t start = 0; start < length; start += kRun) {
        const size_t stop = std::min(length, start + kRun);
        int32_t any = 0;
        for (size_t i = start; i < stop; ++i) any |= in_reach(i);
        if (!any) continue;
        size_t found[kRun], count = 0;
        for (size_t i = start; i < stop; ++i) {
          found[count] = i;
          count += static_cast<size_t>(in_reach(i));
        }
        for (size_t k = 0; k < count; ++k) {
          T*& end = ends[bin[found[k]]];
          if (end) *end++ = clipped(values[found[k]], limit);
        }
      }
    });
  }

  // Call visit(values, their bins, how many) for one block of x after the other. The bins of a block are found
  // first, in a loop that is vectorized.
  template <class Visit>
  static void for_each_block(const Grid<T>& grid, const T* x, size_t n, Visit visit) {
    constexpr size_t kBlock = 256;
    int32_t bin[kBlock];
    for (size_t start = 0; start < n; start += kBlock) {
      const size_t length = std::min(kBlock, n - start);
      grid.find(x + start, length, bin);
      visit(x + start, bin, length);
    }
  }

  void try_split(Split& best, double m, double low) const {
    const double p = objective_.p(m, low), q = objective_.q(m);
    if (best.worse_than(p * p, q)) best = {m, low, p * p, q};
  }

  // Whether a bin promises enough over the best split. If not, the certificate accounts for it.
  bool worth_opening(double p_squared, double q) {
    if (p_squared > (best_.gain() + tolerated_gain_) * q) return true;
    unopened_gain_ = std::max(unopened_gain_, p_squared / q);
    return false;
  }

  const Objective objective_;
  Split best_;
  const double tolerated_gain_;
  const T limit_;
  const int threads_;
  double unopened_gain_ = 0;
  Scratch<T>& scratch_;
};

struct Solution {
  double v1, v2, excess;
};

template <class T>
Solution solve_two_planes(const T* x, size_t n, const Summary<T>& summary, T limit, double tolerance,
                          int threads, Scratch<T>& scratch) {
  const double count = double(n), mean = summary.sum / count;
  const double mean_part = summary.sum * mean;  // of ‖x‖²: what one level saves
  const Split none{0, 0, 0, 1};
  Search<TwoPlanes, T> search({count, summary.sum}, none, tolerance * mean_part, limit, threads, scratch);
  search.row(x, n, summary);
  const Split& best = search.best();
  const double excess = search.missed_gain() / (mean_part + best.gain());
  if (best.m == 0) return {mean, 0, excess};  // the magnitudes differ by less than rounding
  const double low = best.low / best.m, high = (summary.sum - best.low) / (count - best.m);
  return {(high + low) / 2, std::max(0.0, high - low) / 2, excess};
}

template <class T>
Solution solve_ternary(const T* x, size_t n, const Summary<T>& summary, T limit, double tolerance,
                       int threads, Scratch<T>& scratch) {
  const double count = double(n);
  const Split none{0, 0, summary.sum * summary.sum, count};
  Search<Ternary, T> search({count, summary.sum}, none, tolerance * none.gain(), limit, threads, scratch);
  search.row(x, n, summary);
  const Split& best = search.best();
  const double level = (summary.sum - best.low) / (count - best.m);
  return {level / 2, level / 2, search.missed_gain() / best.gain()};
}

template <class T>
Solution solve_row(const T* x, size_t n, SolveScheme scheme, T limit, double tolerance, int threads,
                   Scratch<T>& scratch) {
  const Summary<T> summary = summarize(x, Chunks(n), limit, threads);
  const T highest = summary.highest;
  if (std::isnan(summary.sum) || std::isinf(highest)) {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    return {kNaN, kNaN, kNaN};
  }
  if (summary.lowest == highest) {
    if (scheme == SolveScheme::two_planes) return {double(highest), 0, 0};
    return {double(highest) / 2, double(highest) / 2, 0};
  }
  if constexpr (std::is_same_v<T, double>) {
    // Sums of squares must not overflow nor vanish. Powers of two scale exactly, and what underflows is nothing
    // beside the highest.
    if (highest > 0x1p400 || highest < 0x1p-400) {
      constexpr T kUnlimited = std::numeric_limits<T>::infinity();
      const int exponent = std::ilogb(highest);
      scratch.rescaled.resize(n);
      std::transform(x, x + n, scratch.rescaled.begin(), [=](T value) { return std::scalbn(clipped(value, limit), -exponent); });
      const Solution solution = solve_row(scratch.rescaled.data(), n, scheme, kUnlimited, tolerance, threads, scratch);
      return {std::scalbn(solution.v1, exponent), std::scalbn(solution.v2, exponent), solution.excess};
    }
  }
  if (scheme == SolveScheme::two_planes) return solve_two_planes(x, n, summary, limit, tolerance, threads, scratch);
  return solve_ternary(x, n, summary, limit, tolerance, threads, scratch);
}

}  // namespace

template <class T>
void solve_rows(const T* x, int64_t rows, int64_t n, int64_t row_stride, SolveScheme scheme, T limit,
                double tolerance, int threads, double* scales, double* excess) {
  // Short rows go to the threads in batches: one alone is less work than handing it out.
  const int64_t batch = std::max<int64_t>(1, 16384 / n), batches = (rows + batch - 1) / batch;
  // Where there are too few rows to keep the threads busy, they share each row instead.
  const bool share_rows = Chunks(static_cast<size_t>(n)).count() > 1 && rows < 2 * threads;
  const int row_threads = share_rows ? threads : 1;
  parallel_for(batches, share_rows ? 1 : threads, [&](int64_t task) {
    Scratch<T>& scratch = own_scratch<T>();
    const int64_t end = std::min(rows, (task + 1) * batch);
    for (int64_t row = task * batch; row < end; ++row) {
      const T* const values = x + row * row_stride;
      const Solution solution = solve_row(values, static_cast<size_t>(n), scheme, limit, tolerance, row_threads, scratch);
      scales[2 * row] = solution.v1;
      scales[2 * row + 1] = solution.v2;
      excess[row] = solution.excess;
    }
    scratch.trim();
  });
}

template void solve_rows(const float*, int64_t, int64_t, int64_t, SolveScheme, float, double, int, double*, double*);
template void solve_rows(const double*, int64_t, int64_t, int64_t, SolveScheme, double, double, int, double*,
                         double*);

}  // namespace foldbit
