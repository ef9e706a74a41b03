// Memory of large results, used again.
//
// What malloc takes from the system for a large block it gives back at once, so that every large result begins with a
// page fault for each of its pages: with activations of tens of megabytes that takes longer than the kernels. Blocks
// given back here are kept for results of about their size, up to FASTMETA_KEEP_MB megabytes; unless that is set a
// quarter of the machine's memory, and 1024 at least: a step's graph comes back in the next step.
//
// Pages are of the usual size. In virtual machines whose host takes free memory back, large pages are those that the
// host has to bring again: up to 14 ms a megabyte were measured, and with small ones about 0.7.
#pragma once

#include <stddef.h>

namespace fastmeta::cpu {

constexpr size_t kPooledFrom = size_t(1) << 20;  // smaller blocks malloc keeps by itself

void* take_block(size_t bytes);  // 64-byte aligned
void give_block_back(void* block);

}  // namespace fastmeta::cpu
