// The sentence of a failed launch.
#include "device.h"

namespace fastmeta::cuda {

const char* last_error() {
#ifdef FASTMETA_HOST
  return nullptr;
#else
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace fastmeta::cuda
