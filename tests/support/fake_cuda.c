/* A CUDA driver of host memory: the calls that zimage_runner/weights/preload/cuda_driver.py makes, for tests without a GPU. */
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
/* Filled, so that what nobody writes is seen. */
CUresult cuMemAlloc_v2(uint64_t *p, size_t n) {
    if (!n) return 1;
    if (!(*p = (uint64_t)aligned_alloc(256, (n + 511) / 256 * 256))) return 2;
    memset((void *)*p, 0xa5, n);
    return 0;
}
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 1000000; *total = 2000000; return 0; }
CUresult cuMemFree_v2(uint64_t p) { free((void *)p); return 0; }
int fake_pinned; /* blocks of page-locked memory */
CUresult cuMemHostAlloc(void **p, size_t n, unsigned f) {
    __sync_add_and_fetch(&fake_pinned, 1);
    return (*p = malloc(n)) && !f ? 0 : 2;
}
CUresult cuMemFreeHost(void *p) { __sync_sub_and_fetch(&fake_pinned, 1); free(p); return 0; }
CUresult cuCtxPushCurrent_v2(void *c) { return c == (void *)1 ? 0 : 201; }
CUresult cuCtxPopCurrent_v2(void **c) { *c = (void *)1; return 0; }

/* With FAKE_CUDA_LAZY a stream does nothing before somebody waits for it: as late as a device may. One thread a stream. */
typedef struct { uint64_t to, from; size_t n; int values, counts[3]; } Work; /* n: bytes to copy; 0: to unpack */
typedef struct { Work *work; int given, done; } Stream;
typedef struct { Stream *stream; int place; } Event;
int fake_late; /* pieces of work that were done when they were waited for */

static void unpack_frame(const Work *w);
static void run(Stream *s, int until) {
    for (; s->done < until; s->done++) {
        Work *w = s->work + s->done;
        if (w->n) memcpy((void *)w->to, (void *)w->from, w->n);
        else unpack_frame(w);
        __sync_add_and_fetch(&fake_late, 1);
    }
}
static void give(Stream *s, Work w) {
    if (!getenv("FAKE_CUDA_LAZY")) {
        if (w.n) memcpy((void *)w.to, (void *)w.from, w.n);
        else unpack_frame(&w);
        return;
    }
    s->work = realloc(s->work, (s->given + 1) * sizeof w);
    s->work[s->given++] = w;
}
CUresult cuStreamCreate(void **s, unsigned f) { *s = calloc(1, sizeof(Stream)); return f == 1 ? 0 : 1; }
CUresult cuStreamDestroy_v2(void *s) { free(((Stream *)s)->work); free(s); return 0; }
CUresult cuStreamSynchronize(void *s) {
    if (!s) return 400;
    run(s, ((Stream *)s)->given);
    return 0;
}
CUresult cuEventCreate(void **e, unsigned f) { *e = calloc(1, sizeof(Event)); return f == 2 ? 0 : 1; }
CUresult cuEventDestroy_v2(void *e) { free(e); return 0; }
CUresult cuMemcpyHtoDAsync_v2(uint64_t d, const void *h, size_t n, void *s) {
    char *fail = getenv("FAKE_CUDA_FAIL_AFTER");
    if (fail && __sync_add_and_fetch(&copies, 1) > atoi(fail)) return 700;
    if (!s) return 400;
    if (n) give(s, (Work){.to = d, .from = (uint64_t)h, .n = n});
    return 0;
}
CUresult cuEventRecord(void *e, void *s) {
    if (!e || !s) return 400;
    *(Event *)e = (Event){s, ((Stream *)s)->given};
    return 0;
}
CUresult cuEventSynchronize(void *e) {
    if (!e) return 400;
    if (((Event *)e)->stream) run(((Event *)e)->stream, ((Event *)e)->place);
    return 0;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int d) {
    char *capability = getenv("FAKE_CUDA_CAPABILITY"); /* such as 90 */
    int number = capability ? atoi(capability) : 90;
    if (d || (attribute != 75 && attribute != 76)) return 1;
    *value = attribute == 75 ? number / 10 : number % 10;
    return 0;
}
int fake_modules;
CUresult cuModuleLoadData(void **module, const void *code) {
    __sync_add_and_fetch(&fake_modules, 1);
    if (getenv("FAKE_CUDA_REFUSES_CODE")) return 218;
    *module = (void *)1;
    return memcmp(code, "\177ELF", 4) ? 200 : 0;
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)2;
    return module == (void *)1 && !strcmp(name, "unpack") ? 0 : 500;
}
int fake_launches;

/* The kernel's work on one block, in plain C: its bounds are the kernel's, so that a damaged frame is as harmless. */
static int code_at(const uint8_t *level, int64_t place) { return level[place / 4] >> 2 * (place % 4) & 3; }
static void unpack_block(const uint8_t *frame, uint16_t *out, int values, const int *counts, int block, int blocks) {
    const uint8_t *mantissas = frame + 16 * blocks, *level1 = mantissas + values;
    const uint8_t *level2 = level1 + (values + 3) / 4, *level3 = level2 + (counts[0] + 3) / 4;
    const uint8_t *far = level3 + (counts[1] + 3) / 4;
    const int32_t *row = (const int32_t *)frame + 4 * block;
    int64_t places[3] = {row[1], row[2], row[3]};
    for (int i = 4096 * block; i < values && i < 4096 * (block + 1); i++) {
        int distance = code_at(level1, i) + 1;
        if (distance == 4 && places[0] >= 0 && places[0] < counts[0]) {
            int code = code_at(level2, places[0]++);
            distance = code ? code + 3 : 0;
            if (code == 3 && places[1] >= 0 && places[1] < counts[1]) {
                distance = code_at(level3, places[1]++) + 6;
                if (distance == 9 && places[2] >= 0 && places[2] < counts[2]) distance = far[places[2]++];
            }
        }
        out[i] = (mantissas[i] & 0x80) << 8 | ((row[0] - distance) & 0xff) << 7 | (mantissas[i] & 0x7f);
    }
}
static void unpack_frame(const Work *w) {
    int blocks = (w->values + 4095) / 4096;
    for (int block = 0; block < blocks; block++)
        unpack_block((void *)w->from, (void *)w->to, w->values, w->counts, block, blocks);
}
CUresult cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    Work w = {.from = *(uint64_t *)parameters[0], .to = *(uint64_t *)parameters[1], .values = *(int *)parameters[2]};
    for (int i = 0; i < 3; i++) w.counts[i] = *(int *)parameters[3 + i];
    if (function != (void *)2 || y != 1 || z != 1 || ty != 1 || tz != 1 || !threads || threads % 32 || !stream || extra)
        return 1;
    if ((int)x != (w.values + 4095) / 4096 || shared > 48 << 10 || w.from % 16 || w.to % 16) return 1;
    if (*(uint64_t *)parameters[6] || *(uint64_t *)parameters[7]) return 1;
    give(stream, w);
    __sync_add_and_fetch(&fake_launches, 1);
    return 0;
}
