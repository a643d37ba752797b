// What an operator asks of a device. The operators of a family are written once, in csrc/operators/<family>.h, over a
// `Device` that csrc/cpu/device.h and csrc/cuda/device.cuh define:
//
//   struct Device {
//     // The skeleton: runs `formula` over the first F::kStreams streams of `rows`, writing to `out` if it has data.
//     template <class T, class F, int N>
//     static void rowwise(const F& formula, const Groups&, const Rows<N>& rows, Output out = {});
//     // An output of the rows' shape and layout.
//     template <int N> static Tensor new_output(const Rows<N>&, ScalarType);
//     // The sum of a vector, 0-dimensional; 0 for an empty one.
//     template <class T> static Tensor sum(const Tensor& terms);
//     // {true flags, false flags} of a bool vector, where the device's formulas can read them.
//     template <class T> struct FlagCounts { explicit FlagCounts(const Tensor& flags); const T* data() const; };
//   };
#pragma once

#include "../formulas/formula.h"
#include "../rows.h"

namespace fastgen {

// A formula with `bool idle() const` may find, from numbers on its device, that it has nothing to do.
template <class F>
concept MayBeIdle = requires(const F& formula) { formula.idle(); };

}  // namespace fastgen
