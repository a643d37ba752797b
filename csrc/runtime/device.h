// What an operator asks of a device. The operators of a family are written once, in csrc/<family>.h, over a `Device`,
// which is `Cpu` (cpu.h) or `Cuda` (cuda.cuh):
//
//   struct Device {
//     // The skeletons (skeleton/formula.h): run `formula` over the first F::kStreams streams of `rows`, writing to
//     // `out` if it has data, and to `second` where a formula has a second output. A sweep's output is [..., width].
//     template <class T, class F, int N>
//     static void rowwise(const F& formula, const Groups&, const Rows<N>& rows, Output out = {}, Output second = {});
//     template <class T, class F, int N>
//     static void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width);
//     // Who runs a sweep's row() together, all with the same row and none apart from the others: each takes the numbers
//     // first(), first() + step(), …; sum and maximum over all of them are the same for each.
//     struct Team { static int64_t first(); static int64_t step(); static double sum(double), max(double); };
//     // Some elements of each row of `out`, [rows, columns], again (skeleton/scatter.h); `on` is a tensor of the device.
//     template <class T, class F>
//     static void scatter(const F& formula, const Tensor& on, int64_t rows, const Output& out);
//     // Raises an error where one is not below `size`, on devices where looking at them costs no sync.
//     static void check_indices(const char* name, const Tensor& contiguous, int64_t size);
//     // The (min, +) skeleton, over Costs (skeleton/costs.h): skeleton/paths.h says what each does.
//     static Tensor solve_paths(costs, like, nodes, edges, use_monge, totals);
//     static void find_paths(costs, table, problems, nodes, edges, use_monge, steps);
//     static void inspect_costs(costs, like, problems, nodes, certify, status);
//     // An output of the rows' shape and layout; a contiguous one of the shape of `logits`.
//     template <int N> static Tensor new_output(const Rows<N>&, ScalarType);
//     static Tensor new_logits(const Tensor& logits);
//     // The sum of a vector, 0-dimensional; 0 for an empty one.
//     template <class T> static Tensor sum(const Tensor& terms);
//     // Runs a row-wise formula whose epilogues store the loss's `terms`. Returns those, or their sum by a reduction.
//     template <class T, class F, int N>
//     static Tensor rowwise_loss(const F&, const Groups&, const Rows<N>&, Output out, const Tensor& terms, Reduction);
//     // A bool vector for formulas, as long as this lives; counted, if they want that.
//     template <class T> struct Flags { Flags(const Tensor& flags, bool counted); FlagCounts<T> counts; };
//   };
#pragma once

#include "../skeleton/formula.h"
#include "options.h"
#include "rows.h"

namespace fastgen {

// A formula with `bool idle() const` may find, from numbers on its device, that it has nothing to do.
template <class F>
concept MayBeIdle = requires(const F& formula) { formula.idle(); };

}  // namespace fastgen
