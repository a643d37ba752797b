// What a row-wise formula is. A skeleton (rowwise.h for CPUs, rowwise.cuh for GPUs) reads the streams of a row,
// reduces them to a few sums, hands the sums of a group of rows to a scalar epilogue, and maps the same streams
// to an output. A formula says what is summed, what the epilogue is and what is written:
//
//   template <class T> struct Formula {          // T: the arithmetic type, float or double
//     static constexpr int kStreams;             // inputs that are read, 1 or more
//     static constexpr int kSums;                // sums a row reduces to; 0: map only
//     static constexpr int kMapStreams;          // the first streams, which the map reads; 0: reduce only
//     struct Row { T scale; ... };               // constants of a row; its sums enter the group's times `scale`
//     Row row(int64_t row, int64_t rank) const;  // rank: position of the row in its group
//     void accumulate(const Row&, const T* v, T* sums) const;             // adds one element's share to the sums
//     Slope epilogue(int64_t group, const T* sums) const;                 // runs once a group; stores its results
//     Coefficient coefficient(int64_t row, int64_t rank, const Row&, Slope) const;  // of a row, from the epilogue's value
//     T map(const Row&, Coefficient, const T* v) const;                   // one output element
//     static constexpr bool kMasks;              // optional: true where a stream may be bool
//     static constexpr bool kMapsAtOnce;         // optional: true where groups have one row and the map waits for no sum
//     T second(const Row&, const T* v) const;    // optional, with kMapsAtOnce: an element of a second output
//     bool idle() const;                         // optional: true where numbers on the device leave nothing to do
//     FlagCounts<T>& flag_counts();              // optional: what the epilogue wants to have counted before it runs
//   };
//
// Only the epilogue stores: everything else may run any number of times, on any thread. A skeleton calls row() anew for
// the map, after the group's epilogue: row() may read there what that epilogue has stored.
//
// Slope and Coefficient are T each, or Numbers<T, K> where a group or a row has several. Without sums the slope is T(0).
// Members that a formula's kSums and kMapStreams leave unused may be missing.
//
// Over rows of logits, a *sweep* (sweep.h, sweep.cuh) normalises the rows of one or two streams, hands every
// element to a formula, and writes a gradient:
//
//   template <class T> struct Formula {
//     static constexpr int kStreams;        // 1 or 2
//     static constexpr bool kNormalizes;    // the sweep finds the rows' Softmax; else row() has them from elsewhere
//     static constexpr int kSums;           // that the elements of a row add up to
//     static constexpr int kParts;          // that map() wants of an element; 0: nothing is written
//     static constexpr bool kMapsAtOnce;    // optional: true where there are sums and the map waits for none
//     static constexpr bool kSumsOnly;      // optional: true where there are sums and no output
//     struct Row { ... };                   // constants of a row
//     T inverse_temperature;
//     bool ignored(int64_t row) const;      // the row is not read; its output is 0
//     void ignore(int64_t row) const;       // stores the results of such a row
//     Row row(int64_t row, const Softmax<T>* streams) const;
//     void element(const Row&, const T* v, T* parts, T* sums) const;  // sets parts, adds to sums
//     void epilogue(int64_t row, Row&, const T* sums) const;          // stores results; completes the row for map()
//     T map(const Row&, const T* parts) const;                        // one output element
//     int64_t picked(int64_t row) const;    // optional: the one column, if in range, of which these two want to know:
//     void pick(int64_t row, const Row&, T v) const;   // without parts
//     T map_picked(const Row&, T v) const;             // with parts: its output, instead of map()
//   };
//
// Logits beyond the narrower stream take no part: their output is 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#ifdef __CUDACC__
#define FASTGEN_HD __host__ __device__ __forceinline__
#else
// Always inline: the CPU skeleton compiles one body for several instruction sets, and only code that is inlined
// into it is vectorised for them.
#define FASTGEN_HD inline __attribute__((always_inline))
#endif

namespace fastgen {

// Several numbers of a group or of a row.
template <class T, int K>
struct Numbers {
  T value[K];

  FASTGEN_HD T& operator[](int k) { return value[k]; }
  FASTGEN_HD const T& operator[](int k) const { return value[k]; }
};

// One number or several, alike: how many, and which.
template <class S>
constexpr int kCount = 1;
template <class T, int K>
constexpr int kCount<Numbers<T, K>> = K;

template <class T>
FASTGEN_HD T& nth(T& number, int) {
  return number;
}
template <class T, int K>
FASTGEN_HD T& nth(Numbers<T, K>& numbers, int k) {
  return numbers[k];
}

// What a formula's epilogue and its coefficient() return.
template <class F, class T>
auto slope_of(const F& formula) {
  if constexpr (F::kSums > 0) return formula.epilogue(0, static_cast<const T*>(nullptr));
  else return T(0);
}
template <class F, class T>
using Slope = decltype(slope_of<F, T>(std::declval<const F&>()));
template <class F, class T>
using Coefficient =
    decltype(std::declval<const F&>().coefficient(0, 0, std::declval<const typename F::Row&>(), Slope<F, T>{}));

// Which rows belong together: row(g, r) for r < rows is the r-th row of group g.
struct Groups {
  int64_t count;       // number of groups
  int64_t rows;        // rows in each
  int64_t stride;      // from one group's first row to the next group's
  int64_t row_stride;  // from row to row in a group

  FASTGEN_HD int64_t row(int64_t group, int64_t rank) const { return group * stride + rank * row_stride; }

  static Groups single(int64_t rows) { return {rows, 1, 1, 1}; }                             // each row alone
  static Groups consecutive(int64_t rows, int64_t each) { return {rows / each, each, each, 1}; }  // 0..M-1, M..2M-1, …
  static Groups halves(int64_t rows) { return {rows / 2, 2, 1, rows / 2}; }                  // i and i + B/2
};

// One choice after the other, which compilers vectorise; nested ones become branches. NaN stays NaN.
template <class T>
FASTGEN_HD T clamped(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Whether the map writes a second output too.
template <class F>
constexpr bool kMapsTwo = requires { &F::second; };

// How many of `flags` are set, and how many are not.
template <class T>
struct FlagCounts {
  const uint8_t* flags;   // any byte but 0
  T set = 1, unset = 1;
  int64_t uncounted = 0;  // flags that the kernel has to count
  const T* counted = nullptr;  // {set, unset} in the device's memory, instead of the members

  FASTGEN_HD T of(bool flag) const { return counted ? counted[flag ? 0 : 1] : flag ? set : unset; }
};

template <class F>
concept CountsFlags = requires(F& formula) { formula.flag_counts(); };

template <class F>
constexpr bool kMasks = requires { requires F::kMasks; };

// What a softmax divides by: the maximum of a row and Σ exp((v - max) / temperature). Apart, and the sum itself rather
// than its logarithm: a log-sum of 10 in float would put an error of 5e-7 on all probabilities of the row at once.
template <class T>
struct Softmax {
  T max, sum;
};

// The maximum of a row, as something to subtract: a row of -inf must sum to 0, not to NaN.
template <class T>
FASTGEN_HD T base_of(T max) {
  return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

}  // namespace fastgen
