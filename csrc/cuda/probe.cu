// Which devices there are.  cudart is linked statically and loads the driver itself, so this
// library loads on machines without one.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "cuda/cuda_api.h"
#include "pyllmlite/export.h"

extern "C" PLL_API int32_t pll_cuda_devices(pll_cuda_device* devices, int32_t capacity,
                                            char* error, size_t error_size) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int i = 0; status == cudaSuccess && i < count && i < capacity; ++i) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, i);
    if (status != cudaSuccess) break;
    pll_cuda_device& device = devices[i];
    std::memset(&device, 0, sizeof(device));
    std::snprintf(device.name, sizeof(device.name), "%s", properties.name);
    device.major = properties.major;
    device.minor = properties.minor;
    device.num_sms = properties.multiProcessorCount;
    device.total_bytes = properties.totalGlobalMem;
  }
  if (status == cudaSuccess) return count;
  cudaGetLastError();
  std::snprintf(error, error_size, "%s", cudaGetErrorString(status));
  return -1;
}
