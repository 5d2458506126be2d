/* A CUDA driver of host memory: the calls that zimage_runner/weights/cuda_driver.py makes, for tests without a GPU. */
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
typedef int CUresult;
static int copies;
CUresult cuInit(unsigned f) { return f; }
CUresult cuDeviceGet(int *d, int n) { *d = n; return n == 0 ? 0 : 101; }
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)(intptr_t)(d + 1); return 0; }
CUresult cuDevicePrimaryCtxRelease_v2(int d) { return d == 0 ? 0 : 101; }
CUresult cuCtxSetCurrent(void *c) { return c == (void *)1 ? 0 : 201; }
CUresult cuMemAlloc_v2(uint64_t *p, size_t n) { return (*p = (uint64_t)calloc(1, n ? n : 1)) ? 0 : 2; }
CUresult cuMemFree_v2(uint64_t p) { free((void *)p); return 0; }
int fake_pinned; /* blocks of page-locked memory */
CUresult cuMemHostAlloc(void **p, size_t n, unsigned f) {
    __sync_add_and_fetch(&fake_pinned, 1);
    return (*p = malloc(n)) && !f ? 0 : 2;
}
CUresult cuMemFreeHost(void *p) { __sync_sub_and_fetch(&fake_pinned, 1); free(p); return 0; }
CUresult cuCtxPushCurrent_v2(void *c) { return c == (void *)1 ? 0 : 201; }
CUresult cuCtxPopCurrent_v2(void **c) { *c = (void *)1; return 0; }
CUresult cuStreamCreate(void **s, unsigned f) { *s = malloc(f); return 0; }
CUresult cuStreamDestroy_v2(void *s) { free(s); return 0; }
CUresult cuEventCreate(void **e, unsigned f) { *e = malloc(f); return 0; }
CUresult cuEventDestroy_v2(void *e) { free(e); return 0; }
CUresult cuMemcpyHtoDAsync_v2(uint64_t d, const void *h, size_t n, void *s) {
    char *fail = getenv("FAKE_CUDA_FAIL_AFTER");
    if (fail && __sync_add_and_fetch(&copies, 1) > atoi(fail)) return 700;
    memcpy((void *)d, h, n);
    return s ? 0 : 400;
}
CUresult cuEventRecord(void *e, void *s) { return e && s ? 0 : 400; }
CUresult cuEventSynchronize(void *e) { return e ? 0 : 400; }
