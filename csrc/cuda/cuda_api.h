/* What libpyllmlite_cuda exports; loaded at run time, so plain C. */
#ifndef PYLLMLITE_CUDA_API_H
#define PYLLMLITE_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pll_cuda_device {
  char name[256];
  int32_t major, minor; /* compute capability */
  int32_t num_sms;
  int32_t reserved;
  uint64_t total_bytes; /* global memory */
} pll_cuda_device;

/* Fills at most `capacity` devices and returns how many there are, or -1 with one line in
 * `error`: no driver, no device, a driver too old for this build. */
int32_t pll_cuda_devices(pll_cuda_device* devices, int32_t capacity, char* error,
                         size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
