// Trajectories of costs that satisfy the quadrangle inequality: divide and conquer over the layers of the table.
//
// For such costs the best predecessor of t, the lowest of several, does not decrease with t. So it is found for every
// kLeaf-th node by bisection, and between two of those nodes only the predecessors between theirs are tried, for kLeaf
// nodes t at once in vector lanes. Their own predecessors are not recorded: paths are recovered by a second scan.
#pragma once

#include <algorithm>
#include <vector>

#include "minplus.h"

namespace fastgen::cpu {

constexpr int64_t kLeaf = 32;             // nodes t between two bisected ones
constexpr int64_t kTree = 64;             // leaves that one thread takes; the bisection above them is serial
constexpr int64_t kSerialNodes = 8192;    // layers that are not worth waking threads for

// C[t,k] of one problem: layer k is a row over t, of which t >= k is used.
template <class T>
struct Layers {
  T* data;
  int64_t nodes;

  static int64_t size(int64_t nodes, int64_t edges) { return nodes * (edges + 1); }
  FASTGEN_HD T at(int64_t t, int64_t k) const { return data[k * nodes + t]; }
};

// The lowest s in [low, high] with the least c[s] + F[s,t], compared exactly: rounded sums tie where exact ones do not,
// and the lowest of those ties may break the order that the bisection relies on. The least *rounded* sum is that of the
// least exact one, so the table is to the bit that of the exhaustive sweep.
template <int Bytes, class T>
FASTGEN_HD int64_t best_predecessor(const MatrixCost<T>& cost, const T* c, int64_t t, int64_t low, int64_t high) {
  int64_t best = low;
  ExactSum<T> least(c[low], cost.at(low, t));
  for (int64_t s = low + 1; s <= high; ++s) {
    const ExactSum<T> sum(c[s], cost.at(s, t));
    if (sum < least) least = sum, best = s;
  }
  return best;
}

// The same for a factored cost. Products are compared as they round: a tie within an ulp may go to another predecessor.
// Lanes keep their own minimum and its place (a float: exact up to 2^24 and 2^53).
template <int Bytes, class T>
FASTGEN_HD int64_t best_predecessor(const FactoredCost<T>& cost, const T* c, int64_t t, int64_t low, int64_t high) {
  using V = typename UnalignedVectorOf<T, Bytes>::type;
  constexpr int kLanes = Bytes / sizeof(T), kVectors = 2;
  T least = kInfinity<T>;
  int64_t best = low;
  if (high - low + 1 < kLanes) {
    for (int64_t s = low; s <= high; ++s) {
      const T path = c[s] * cost.at(s, t);
      best = path < least ? s : best;
      least = path < least ? path : least;
    }
    return best;
  }
  V number, lanes[kVectors], places[kVectors];
  for (int l = 0; l < kLanes; ++l) number[l] = static_cast<T>(l);
  for (int j = 0; j < kVectors; ++j) lanes[j] = V{} + kInfinity<T>, places[j] = V{};
  for (int64_t s = low; s <= high; s += kVectors * kLanes)
    for (int j = 0; j < kVectors; ++j) {
      // The last vectors overlap those before them.
      const int64_t at = std::min(s + j * kLanes, high + 1 - kLanes);
      const V path = *reinterpret_cast<const V*>(c + at) * (*reinterpret_cast<const V*>(cost.v + at) + cost.h[t]);
      const V place = number + static_cast<T>(at - low);
      places[j] = path < lanes[j] ? place : places[j];
      lanes[j] = path < lanes[j] ? path : lanes[j];
    }
  T place = T(0);
  for (int j = 0; j < kVectors; ++j)
    for (int l = 0; l < kLanes; ++l) {
      const bool better = lanes[j][l] < least || (lanes[j][l] == least && places[j][l] < place);
      place = better ? places[j][l] : place;
      least = better ? lanes[j][l] : least;
    }
  return low + static_cast<int64_t>(place);
}

// One layer: to[t] from the layer before, for t in [first, nodes), whose predecessors are first - 1 .. t - 1.
template <class Cost>
struct Layer {
  using T = typename Cost::Scalar;
  Cost cost;
  const T* from;
  T* to;
  int64_t nodes, first;
  int64_t* best;  // the best predecessors of the nodes first, first + kLeaf, …

  int64_t leaves() const { return (nodes - first + kLeaf - 1) / kLeaf; }
  int64_t trees() const { return (leaves() + kTree - 1) / kTree; }
  FASTGEN_HD int64_t node(int64_t leaf) const { return first + leaf * kLeaf; }
};

// Bisects leaves low, low + stride, … below `high`, of which the first and, if `high` is one, the last are known.
template <int Bytes, class Cost>
FASTGEN_HD void bisect(const Layer<Cost>& layer, int64_t low, int64_t high, int64_t leaves, int64_t stride) {
  int64_t step = stride;
  while (low + step < high) step *= 2;
  for (; step > stride; step /= 2)
    for (int64_t leaf = low + step / 2; leaf < high; leaf += step) {
      const int64_t t = layer.node(leaf), next = leaf + step / 2;
      const int64_t above = next < high || (next == high && high < leaves) ? layer.best[next] : t - 1;
      layer.best[leaf] =
          best_predecessor<Bytes>(layer.cost, layer.from, t, layer.best[leaf - step / 2], std::min(above, t - 1));
    }
}

// The edges from s to the nodes t, t + 1, … of a vector's lanes.
template <class T, class V>
FASTGEN_HD void edges_from(const MatrixCost<T>& cost, int64_t s, int64_t t, V& edge) {
  edge = *reinterpret_cast<const V*>(cost.data + s * cost.row_stride + t);
}
template <class T, class V>
FASTGEN_HD void edges_from(const FactoredCost<T>& cost, int64_t s, int64_t t, V& edge) {
  edge = *reinterpret_cast<const V*>(cost.h + t) + cost.v[s];
}

// The kLeaf nodes from t0, whose predecessors are in [low, high], in vector lanes.
template <int Bytes, class Cost>
FASTGEN_HD void fill_lanes(const Layer<Cost>& layer, int64_t t0, int64_t low, int64_t high,
                           typename Cost::Scalar* least) {
  using T = typename Cost::Scalar;
  using V = typename UnalignedVectorOf<T, Bytes>::type;
  constexpr int kLanes = Bytes / sizeof(T), kVectors = kLeaf / kLanes;
  V lanes[kVectors];
  for (V& lane : lanes) lane = V{} + kInfinity<T>;
  int64_t s = low;
  for (; s <= std::min(high, t0 - 1); ++s)
    for (int j = 0; j < kVectors; ++j) {
      V edge, path;
      edges_from(layer.cost, s, t0 + j * kLanes, edge);
      Cost::extend(edge, layer.from[s], path);
      lanes[j] = path < lanes[j] ? path : lanes[j];
    }
  const V none = V{} + kInfinity<T>;
  V number[kVectors];  // of the node in each lane, counted from t0
  for (int j = 0; j < kVectors; ++j)
    for (int l = 0; l < kLanes; ++l) number[j][l] = static_cast<T>(j * kLanes + l);
  for (; s <= high; ++s) {  // predecessors within the leaf, of the nodes after them
    const T own = static_cast<T>(s - t0);
    for (int j = 0; j < kVectors; ++j) {
      V edge, path;
      edges_from(layer.cost, s, t0 + j * kLanes, edge);
      Cost::extend(edge, layer.from[s], path);
      path = number[j] > V{} + own ? path : none;
      lanes[j] = path < lanes[j] ? path : lanes[j];
    }
  }
  for (int j = 0; j < kVectors; ++j) *reinterpret_cast<V*>(least + j * kLanes) = lanes[j];
}

template <int Bytes, class Cost>
FASTGEN_HD void fill_leaf(const Layer<Cost>& layer, int64_t leaf, int64_t low, int64_t high) {
  using T = typename Cost::Scalar;
  // A leaf that the last node cuts short is filled up with nodes before it, whose results are dropped.
  const int64_t t0 = layer.node(leaf), t1 = std::min(t0 + kLeaf, layer.nodes), base = std::min(t0, layer.nodes - kLeaf);
  alignas(64) T least[kLeaf];
  if (base >= 0) {
    fill_lanes<Bytes>(layer, base, low, high, least);
  } else {
    for (T& l : least) l = kInfinity<T>;
    for (int64_t s = low; s <= high; ++s)
      for (int64_t t = std::max(s + 1, t0); t < t1; ++t) {
        T path;
        Cost::extend(layer.from[s], layer.cost.at(s, t), path);
        least[t - base] = path < least[t - base] ? path : least[t - base];
      }
  }
  for (int64_t t = t0; t < t1; ++t) layer.to[t] = layer.cost.finish(least[t - base], t);
}

// The trees [begin, end) of a layer, whose first leaves are known: their other leaves, and all nodes.
template <int Bytes>
struct MongeTrees {
  template <class Cost>
  static FASTGEN_HD void run(const Layer<Cost>& layer, int64_t begin, int64_t end) {
    const int64_t leaves = layer.leaves();
    for (int64_t tree = begin; tree < end; ++tree) {
      const int64_t low = tree * kTree, high = std::min(low + kTree, leaves);
      bisect<Bytes>(layer, low, high, leaves, 1);
      for (int64_t leaf = low; leaf < high; ++leaf)
        fill_leaf<Bytes>(layer, leaf, layer.best[leaf], leaf + 1 < leaves ? layer.best[leaf + 1] : layer.nodes - 2);
    }
  }
};

// The first leaf of every tree.
template <int Bytes>
struct MongeRoots {
  template <class Cost>
  static FASTGEN_HD void run(const Layer<Cost>& layer, int64_t, int64_t) {
    layer.best[0] = layer.first - 1;  // node `first` has one predecessor
    bisect<Bytes>(layer, 0, layer.leaves(), layer.leaves(), kTree);
  }
};

// Fills the table of one problem, layer by layer.
template <class Cost>
void monge(const Cost& cost, const Layers<typename Cost::Scalar>& table, int64_t edges) {
  using T = typename Cost::Scalar;
  const int64_t nodes = table.nodes;
  std::vector<int64_t> best(nodes / kLeaf + 2);
  for (int64_t t = 0; t < nodes; ++t) table.data[t] = t == 0 ? Cost::kStart : kInfinity<T>;
  for (int64_t k = 1; k <= edges; ++k) {
    const Layer<Cost> layer{cost, table.data + (k - 1) * nodes, table.data + k * nodes, nodes, k, best.data()};
    run_vectors<MongeRoots>(layer, 0, 1);
    if (nodes - k < kSerialNodes) run_vectors<MongeTrees>(layer, 0, layer.trees());
    else
      torch::stable::parallel_for(0, layer.trees(), 1, [&](int64_t begin, int64_t end) {
        run_vectors<MongeTrees>(layer, begin, end);
      });
  }
}

}  // namespace fastgen::cpu
