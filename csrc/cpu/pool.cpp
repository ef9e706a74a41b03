#include "pool.h"

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <map>
#include <mutex>
#include <new>

namespace fastmeta::cpu {
namespace {

constexpr size_t kAlignment = 64;

// Four sizes between a power of two and the next, so that blocks fit results of nearly their size.
size_t rounded(size_t bytes) {
  size_t power = kPooledFrom;
  while (power * 2 <= bytes) power *= 2;
  const size_t step = power / 4;
  return (bytes + step - 1) / step * step;
}

// Of the machine, or what the process's control group (version 2, 1) leaves it; 0 where nothing says.
size_t memory_of_machine() {
  size_t most = 0;
#if defined(__linux__)
  most = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
#endif
  for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    size_t limit = 0;
    if (std::ifstream(file) >> limit) most = std::min(most, limit);  // "max" is no number
  }
  return most;
}

size_t most_idle() {
  const char* given = std::getenv("FASTMETA_KEEP_MB");
  if (!given || !*given) return std::max(size_t(1) << 30, memory_of_machine() / 4);
  const long long megabytes = std::atoll(given);
  return size_t(megabytes > 0 ? megabytes : 0) << 20;
}

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    void* block = nullptr;
    if (std::deque<uint64_t>& idle = idle_[size]; !idle.empty()) {
      const auto newest = by_age_.find(idle.back());
      block = newest->second.block;
      by_age_.erase(newest);
      idle.pop_back();
      idle_bytes_ -= size;
    } else {
      block = std::aligned_alloc(kAlignment, size);
      if (block == nullptr) {
        let_go(0);
        block = std::aligned_alloc(kAlignment, size);
      }
      if (block == nullptr) throw std::bad_alloc();
    }
    sizes_[block] = size;
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(block);
    const size_t size = found->second;
    sizes_.erase(found);
    if (size > most_) return std::free(block);
    let_go(most_ - size);
    idle_[size].push_back(returned_);
    by_age_[returned_++] = {block, size};
    idle_bytes_ += size;
  }

 private:
  struct Idle {
    void* block;
    size_t size;
  };

  // those that came back first: they are of sizes that were needed before, and may never be again
  void let_go(size_t allowed) {
    while (idle_bytes_ > allowed) {
      const auto oldest = by_age_.begin();
      std::free(oldest->second.block);
      idle_bytes_ -= oldest->second.size;
      idle_[oldest->second.size].pop_front();
      by_age_.erase(oldest);
    }
  }

  std::mutex mutex_;
  std::map<size_t, std::deque<uint64_t>> idle_;  // when blocks of a size came back, the oldest first
  std::map<uint64_t, Idle> by_age_;
  uint64_t returned_ = 0;
  std::map<void*, size_t> sizes_;  // of blocks in use
  size_t idle_bytes_ = 0;
  const size_t most_ = most_idle();
};

// never destroyed: tensors may outlive static objects
Pool& pool() {
  static Pool* made = new Pool;
  return *made;
}

}  // namespace

void* take_block(size_t bytes) { return pool().take(bytes); }
void give_block_back(void* block) { pool().give_back(block); }

}  // namespace fastmeta::cpu
