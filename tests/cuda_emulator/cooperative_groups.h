#pragma once

#include "emulator.h"

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive() { emulator::state.current->cluster_token = emulator::state.cluster.arrive(); }
  static void barrier_wait() {
    emulator::wait([] { return emulator::state.cluster.open(emulator::state.current->cluster_token); });
  }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  static unsigned num_blocks() { return static_cast<unsigned>(emulator::state.blocks.size()); }
  static unsigned block_rank() {
    return static_cast<unsigned>(emulator::state.current->block - emulator::state.blocks.data());
  }
  template <class T>
  static T* map_shared_rank(T* p, int rank) {
    auto& block = emulator::state.blocks[rank];
    if (!block.started || block.running == 0) emulator::fail("shared memory of a block that is not running");
    return reinterpret_cast<T*>(block.memory.data() +
                                (reinterpret_cast<unsigned char*>(p) - emulator::state.current->block->memory.data()));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

inline void __cluster_barrier_arrive_relaxed() { cooperative_groups::cluster_group::barrier_arrive(); }
