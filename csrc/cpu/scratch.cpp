// Scratch memory of the worker threads.
#include "kernels.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace fastmeta::cpu {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(size_t bytes) {
  constexpr size_t kAlignment = 64;
  if (bytes > buffer.size || buffer.data == nullptr) {
    const size_t size = (bytes + bytes / 2 + 4096) / kAlignment * kAlignment;
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(kAlignment, size);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace fastmeta::cpu
