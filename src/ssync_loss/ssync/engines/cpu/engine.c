/* SSync on a CPU: hard labels, merged slots, regions, and both losses with their gradients.

   Source: Moon & Heo, ECCV 2026 (arXiv:2606.15527). The steps of the method:

     1. Compute hard labels of both maps, and the mean of every encoder slot.   hard_labels, add_slots
     2. Compute the overlaps of slots. One bit per patch marks an active slot.   count_overlap
     3. Merge slots by union-find. The largest slot represents its group.        merge_slots
     4. Count differing neighbors, and select the boundary and the interior.     select_region
     5. Compute softmax, loss and gradient in one pass.                          teach_frame

   Maps are (B, T, S, H, W) with any strides. The file includes itself twice, for float and for double. A task is a
   clip (steps 1 to 4) or a frame (step 5). Every task writes its own result. One thread adds the results in order, so
   they do not depend on the number of threads. */

#ifndef REAL

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SLOTS = 64, MAX_THREADS = 64, BLOCK = 64, LANES = 16, RUN = 1024 };
enum { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT = 3 };
enum { NOT_TAUGHT = -1, NO_SLOT = -2 };

/* One more thread pays off per this number of logits. Starting a thread costs more than waking one of a team. */
#ifndef CELLS_PER_THREAD
#define CELLS_PER_THREAD 131072
#endif
#ifndef CELLS_FOR_A_TEAM
#define CELLS_FOR_A_TEAM 32768
#endif

typedef struct {
    void *data; /* NULL if absent */
    int64_t kind;
    int64_t strides[5]; /* in elements, of (B, T, S, H, W); labels and masks have no S */
} Tensor;

/* The type of `GOMP_parallel` in an OpenMP library. It runs a function on every thread of a team. */
typedef void Team(void (*function)(void *), void *data, unsigned num_threads, unsigned flags);

/* Inputs, outputs and working memory of a call. Python declares the same fields for ctypes. */
typedef struct {
    int64_t num_clips, num_frames, num_slots, height, width, num_threads;
    Team *team;                 /* NULL in a forked child; the call then starts its own threads */
    Tensor enc, dec, valid;     /* a single map is `enc` */
    const uint8_t *slot_mask;   /* (B, S), or NULL */
    const uint8_t *clean;       /* one bool, or NULL; false if a map of the given labels holds NaN or +inf */
    const double *knobs;        /* merge threshold, weight of the boundary term, weight of the interior term */
    int64_t min_different, min_same, max_different;
    int64_t cross_entropy;
    double label_smoothing, temperature;
    Tensor target, region;      /* of a single map, int64 and bool */
    void *boundary_mean;        /* weighted; NULL for labels only */
    void *interior_mean;        /* weighted; NULL if `boundary_mean` is the sum of both */
    void *values;               /* of a single map: the loss, or the value of every patch */
    int64_t *counts;            /* number of selected patches in each region */
    void *grad_enc, *grad_dec;  /* contiguous; NULL if not needed */
    int64_t *enc_labels, *dec_labels, *representative; /* merged; NULL if not needed */
    uint8_t *boundary, *interior;
    int8_t *hard;               /* (2, B, T, N): labels before merging; -1 if invalid */
    int8_t *names;              /* (B, S): representatives */
    uint8_t *found_clean;       /* one bool, true if no map holds NaN or +inf */
    int64_t reduction;          /* of a single map: 0 none, 1 sum, 2 mean */
    int64_t kind;               /* type of the scaled gradient */
    /* working memory */
    int8_t *targets;            /* (2, B, T, N): for the decoder's map, and for the encoder's */
    double *sums;               /* (2, B * T): sum of the errors of each frame */
    int64_t *selected;          /* (2, B): number of patches in each region */
    uint8_t *dirty;             /* (B,): 1 for a clip with NaN or +inf */
    int64_t given;              /* 1 if `hard` and `names` are inputs */
    double scales[2];           /* factors of the gradients */
} Call;

typedef int Task(const Call *call, int64_t task, void *scratch);

/* Threads of a crew take the next task until none is left. */
typedef struct {
    Task *task;
    const Call *call;
    int64_t num_tasks;
    size_t scratch_size;
    atomic_llong next;
    atomic_int failed;
} Crew;

static void work(void *argument) {
    Crew *crew = argument;
    void *scratch = malloc(crew->scratch_size);
    if (!scratch) atomic_store(&crew->failed, 1);
    for (int64_t task; scratch && (task = atomic_fetch_add(&crew->next, 1)) < crew->num_tasks;)
        if (crew->task(crew->call, task, scratch)) atomic_store(&crew->failed, 1);
    free(scratch);
}

static void *work_in_thread(void *crew) {
    work(crew);
    return NULL;
}

static void work_with_helpers(Crew *crew, int64_t wanted) {
    pthread_t threads[MAX_THREADS];
    int64_t helpers = 0;
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    while (helpers < wanted - 1 && !pthread_create(&threads[helpers], NULL, work_in_thread, crew)) helpers++;
    work(crew);
    while (helpers > 0) pthread_join(threads[--helpers], NULL);
}

static int run(Task *task, const Call *call, int64_t num_tasks, size_t scratch_size) {
    Crew crew = {.task = task, .call = call, .num_tasks = num_tasks, .scratch_size = scratch_size};
    int64_t cells = call->num_clips * call->num_frames * call->num_slots * call->height * call->width;
    int64_t useful = 1 + cells / (call->team ? CELLS_FOR_A_TEAM : CELLS_PER_THREAD);
    if (useful > num_tasks) useful = num_tasks;
    if (useful < 2 || call->num_threads < 2)
        work(&crew);
    else if (call->team) /* OpenMP would rebuild its team for another number of threads than torch's */
        call->team(work, &crew, (unsigned)call->num_threads, 0);
    else
        work_with_helpers(&crew, call->num_threads < useful ? call->num_threads : useful);
    return crew.failed;
}

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value = (half & 0x7c00) == 0x7c00 ? as_float(bits | 0x7f800000) : as_float(bits) * 0x1p112f;
    return as_float(as_bits(value) | (uint32_t)(half & 0x8000) << 16);
}

/* Rounds to the nearest half, and to an even one on a tie. */
static uint16_t to_half(float value) {
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    /* below the smallest normal half, the addition of 0.5f rounds to a multiple of the smallest half */
    if (magnitude < 0x38800000) return sign | (uint16_t)(as_bits(as_float(magnitude) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static float from_bfloat(uint16_t value) { return as_float((uint32_t)value << 16); }

static uint16_t to_bfloat(float value) {
    uint32_t bits = as_bits(value);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static int64_t frame_offset(const Tensor *tensor, int64_t b, int64_t t) {
    return b * tensor->strides[0] + t * tensor->strides[1];
}

/* Copies the mask of a frame to one byte per patch. Without a mask all patches count. */
static void read_bytes(const Call *call, const Tensor *tensor, int64_t b, int64_t t, uint8_t *bytes) {
    if (!tensor->data) {
        memset(bytes, 1, call->height * call->width);
        return;
    }
    const uint8_t *first = (const uint8_t *)tensor->data + frame_offset(tensor, b, t);
    for (int64_t h = 0; h < call->height; h++)
        for (int64_t w = 0; w < call->width; w++)
            *bytes++ = first[h * tensor->strides[3] + w * tensor->strides[4]] != 0;
}

/* Lists the present slots of a clip, and returns their number. */
static int list_slots(const Call *call, int64_t b, int *slots) {
    int number = 0;
    for (int s = 0; s < call->num_slots; s++)
        if (!call->slot_mask || call->slot_mask[b * call->num_slots + s]) slots[number++] = s;
    return number;
}

/* Step 3: returns the root of a slot, and shortens the path to it. */
static int find(int *parent, int slot) {
    while (parent[slot] != slot) slot = parent[slot] = parent[parent[slot]];
    return slot;
}

static void merge_slots(int num_slots, const double *overlap, double threshold, const int64_t *area, int8_t *name) {
    int parent[MAX_SLOTS], largest[MAX_SLOTS];
    for (int s = 0; s < num_slots; s++) parent[s] = s, largest[s] = -1;
    for (int i = 0; i < num_slots; i++)
        for (int j = 0; j < i; j++)
            if (overlap[i * num_slots + j] > threshold) parent[find(parent, i)] = find(parent, j);
    for (int s = 0; s < num_slots; s++) {
        int root = find(parent, s);
        if (largest[root] < 0 || area[s] > area[largest[root]]) largest[root] = s;
    }
    for (int s = 0; s < num_slots; s++) name[s] = (int8_t)largest[find(parent, s)];
}

/* Step 4: copies a clip's labels, and repeats the outermost patches around every frame. In `framed` a neighbor is then
   at the same distance for all patches. */
static void add_rims(const Call *call, const int8_t *labels, int8_t *framed) {
    int64_t H = call->height, W = call->width;
    for (int64_t t = 0; t < call->num_frames; t++, labels += H * W)
        for (int64_t h = 0; h < H + 2; h++, framed += W + 2) {
            const int8_t *row = labels + W * (h < 1 ? 0 : h > H ? H - 1 : h - 1);
            memcpy(framed + 1, row, W);
            framed[0] = row[0], framed[W + 1] = row[W - 1];
        }
}

/* Selects the patches with low to high differing neighbors, and returns their number. An invalid patch has label -1. It
   is never selected, and does not count as a differing neighbor. */
static int64_t select_region(const Call *call, const int8_t *framed, int64_t low, int64_t high, int8_t *chosen,
                             int8_t *targets) {
    int64_t H = call->height, W = call->width, T = call->num_frames, wide = W + 2, size = (H + 2) * wide, number = 0;
    const int8_t low_count = (int8_t)low, high_count = (int8_t)high;
    for (int64_t t = 0; t < T; t++, framed += size) {
        const int8_t *own = framed, *before = t ? own - size : own, *after = t + 1 < T ? own + size : own;
        const int8_t *above = own - wide, *below = own + wide;
#define DIFFERS(neighbor) (((neighbor) != own[i]) & ((neighbor) >= 0))
        for (int64_t i = wide + 1; i < size - wide - 1; i++) {
            int8_t count = DIFFERS(above[i - 1]) + DIFFERS(above[i]) + DIFFERS(above[i + 1]) + DIFFERS(own[i - 1]) +
                           DIFFERS(own[i + 1]) + DIFFERS(below[i - 1]) + DIFFERS(below[i]) + DIFFERS(below[i + 1]) +
                           DIFFERS(before[i]) + DIFFERS(after[i]);
            chosen[i] = (count >= low_count) & (count <= high_count) ? own[i] : NOT_TAUGHT;
        }
#undef DIFFERS
        for (int64_t h = 0; h < H; h++) memcpy(targets + (t * H + h) * W, chosen + (h + 1) * wide + 1, W);
    }
    for (int64_t i = 0; i < T * H * W; i++) number += targets[i] >= 0;
    return number;
}

static void write_labels(const int8_t *from, int64_t *to, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] = from[i] < 0 ? 0 : from[i];
}

static void write_region(const int8_t *targets, uint8_t *to, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] = targets[i] >= 0;
}

/* The memory of `select_clip` holds the merged labels of a clip, and a frame and a clip with rims. */
static size_t select_scratch(const Call *call) {
    return call->num_frames * call->height * call->width +
           (call->num_frames + 1) * (call->height + 2) * (call->width + 2) + 1;
}

/* Step 4 for a clip: computes merged labels and both regions. */
static int select_clip(const Call *call, int64_t b, void *memory) {
    int64_t S = call->num_slots, size = call->num_frames * call->height * call->width, start = b * size;
    const int8_t *name = call->names + b * S;
    int8_t *merged = memory, *chosen = merged + size, *framed = chosen + (call->height + 2) * (call->width + 2);
    int64_t *written[] = {call->enc_labels, call->dec_labels};
    uint8_t *regions[] = {call->boundary, call->interior};
    const int64_t low[] = {call->min_different, 0}, high[] = {10 - call->min_same, call->max_different};
    for (int map = 0; map < 2; map++) {
        int64_t place = map * call->num_clips * size + start;
        const int8_t *hard = call->hard + place;
        int8_t *targets = call->targets + place;
        for (int64_t i = 0; i < size; i++) merged[i] = hard[i] < 0 ? NOT_TAUGHT : name[hard[i]];
        add_rims(call, merged, framed);
        call->selected[map * call->num_clips + b] = select_region(call, framed, low[map], high[map], chosen, targets);
        if (written[map]) write_labels(merged, written[map] + start, size);
        if (regions[map]) write_region(targets, regions[map] + start, size);
    }
    for (int s = 0; call->representative && s < S; s++) call->representative[b * S + s] = name[s];
    return 0;
}

static int is_dirty(const Call *call) {
    int dirty = call->clean && !*call->clean;
    for (int64_t b = 0; b < call->num_clips; b++) dirty |= call->dirty[b];
    return dirty;
}

/* Returns the divisor of a mean, and writes the number of selected patches. */
static double divisor(const Call *call, int map, int64_t *selected) {
    double by = 0;
    int slots[MAX_SLOTS];
    *selected = 0;
    for (int64_t b = 0; b < call->num_clips; b++) {
        int64_t number = call->selected[map * call->num_clips + b];
        *selected += number;
        by += (double)number * (call->cross_entropy ? 1 : list_slots(call, b, slots));
    }
    return by > 0 ? by : 1;
}

#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define TYPED(name) JOIN(name, SUFFIX)

#define REAL float
#define SUFFIX f32
#define KIND FLOAT
#define IS_FLOAT 1
#include "engine.c"
#undef REAL
#undef SUFFIX
#undef KIND
#undef IS_FLOAT

#define REAL double
#define SUFFIX f64
#define KIND DOUBLE
#define IS_FLOAT 0
#include "engine.c"

#else /* REAL */

/* Returns 2^x for x <= 0, and 0 for NaN or if 2^x is below the normal numbers. The polynomial interpolates 2^f on
   [-1/2, 1/2] at Chebyshev points, with errors of 2.5e-9 (float) and 4e-18 (double). */
static inline REAL TYPED(power_of_two)(REAL x) {
#if IS_FLOAT
    REAL low = -126, bounded = x > low ? x : low, whole = floorf(bounded + 0.5f), f = bounded - whole;
    REAL p = 1.546144469e-4f;
    p = p * f + 1.340042818e-3f, p = p * f + 9.618056679e-3f, p = p * f + 5.550327227e-2f;
    p = p * f + 2.402265092e-1f, p = p * f + 6.931472067e-1f, p = p * f + 1;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
#else
    REAL low = -1022, bounded = x > low ? x : low, whole = floor(bounded + 0.5), f = bounded - whole;
    REAL p = 4.455817908336064e-10;
    p = p * f + 7.074194297288521e-9, p = p * f + 1.0178057087733941e-7, p = p * f + 1.3215432535912376e-6;
    p = p * f + 1.5252733841556773e-5, p = p * f + 1.5403530463724354e-4, p = p * f + 1.3333558146406471e-3;
    p = p * f + 9.618129107587257e-3, p = p * f + 5.550410866482162e-2, p = p * f + 2.402265069591016e-1;
    p = p * f + 6.931471805599453e-1, p = p * f + 1;
    uint64_t bits = (uint64_t)((int64_t)whole + 1023) << 52;
#endif
    REAL scale;
    memcpy(&scale, &bits, sizeof scale);
    return x > low ? p * scale : 0;
}

/* Returns a frame of a map as contiguous (S, N). A frame of another layout or type is copied to `scratch`. */
static const REAL *TYPED(read_frame)(const Call *call, const Tensor *map, int64_t b, int64_t t, REAL *scratch) {
    int64_t S = call->num_slots, H = call->height, W = call->width, first = frame_offset(map, b, t);
    const int64_t *strides = map->strides;
    if (map->kind == KIND && (W == 1 || strides[4] == 1) && (H == 1 || strides[3] == W) &&
        (S == 1 || strides[2] == H * W))
        return (const REAL *)map->data + first;
    REAL *to = scratch;
#define COPY(TYPE, WIDEN)                                                              \
    for (int64_t s = 0; s < S; s++)                                                    \
        for (int64_t h = 0; h < H; h++) {                                              \
            const TYPE *row = (const TYPE *)map->data + first + s * strides[2] + h * strides[3]; \
            if (strides[4] == 1)                                                       \
                for (int64_t w = 0; w < W; w++) *to++ = (REAL)WIDEN(row[w]);           \
            else                                                                       \
                for (int64_t w = 0; w < W; w++) *to++ = (REAL)WIDEN(row[w * strides[4]]); \
        }
    if (map->kind == FLOAT) {
        COPY(float, )
    } else if (map->kind == DOUBLE) {
        COPY(double, )
    } else if (map->kind == HALF) {
        COPY(uint16_t, from_half)
    } else {
        COPY(uint16_t, from_bfloat)
    }
#undef COPY
    return scratch;
}

/* Step 1: labels every patch with its first largest present slot, or -1 if it is invalid. Returns 1 if a valid patch
   holds NaN or +inf. */
static int TYPED(hard_labels)(const Call *call, const REAL *frame, const int *slots, int num_present,
                              const uint8_t *valid, int8_t *labels) {
    int64_t N = call->height * call->width;
    int dirty = 0;
    for (int64_t start = 0; start < N; start += BLOCK) {
        int size = (int)(N - start < BLOCK ? N - start : BLOCK);
        REAL largest[BLOCK];
        int32_t label[BLOCK], illegal[BLOCK];
        for (int i = 0; i < size; i++) {
            largest[i] = frame[slots[0] * N + start + i];
            label[i] = slots[0], illegal[i] = !(largest[i] < (REAL)INFINITY);
        }
        for (int k = 1; k < num_present; k++) {
            const REAL *row = frame + slots[k] * N + start;
            int32_t s = slots[k];
            for (int i = 0; i < size; i++) {
                REAL value = row[i];
                int larger = value > largest[i];
                label[i] = larger ? s : label[i];
                largest[i] = larger ? value : largest[i];
                illegal[i] |= !(value < (REAL)INFINITY);
            }
        }
        for (int i = 0; i < size; i++) {
            int counts = valid[start + i];
            labels[start + i] = counts ? (int8_t)label[i] : NOT_TAUGHT;
            dirty |= counts & illegal[i];
        }
    }
    return dirty;
}

/* Sums every present slot over the valid patches of a frame. Lanes sum a run, and a double sums the runs. The copy has a
   loop of its own: if lanes add `valid ? row : 0`, GCC 12.2 lets one lane's `valid` decide for another, on processors
   with AVX but without AVX-512 (bug 114375 of GCC). */
static void TYPED(add_slots)(const Call *call, const REAL *frame, const int *slots, int num_present,
                             const uint8_t *valid, double *totals) {
    int64_t N = call->height * call->width;
    for (int k = 0; k < num_present; k++) {
        const REAL *row = frame + slots[k] * N;
        for (int64_t start = 0; start < N; start += RUN) {
            int size = (int)(N - start < RUN ? N - start : RUN), padded = (size + LANES - 1) / LANES * LANES;
            REAL kept[RUN], lanes[LANES] = {0};
            for (int i = 0; i < size; i++) kept[i] = valid[start + i] ? row[start + i] : 0;
            for (int i = size; i < padded; i++) kept[i] = 0;
            for (int i = 0; i < padded; i += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += kept[i + lane];
            double total = 0;
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
            totals[slots[k]] += total;
        }
    }
}

/* Step 2: adds the IoU of every two slots in a frame. Every slot has a plane of bits; a bit is 1 where the slot exceeds
   its mean. The order of the bits is the same for all slots, and otherwise arbitrary. */
static void TYPED(count_overlap)(const Call *call, const REAL *frame, const int *slots, int num_present,
                                 const uint8_t *valid, const REAL *mean, uint64_t *planes, double *overlap) {
    int64_t N = call->height * call->width, words = (N + 63) / 64, S = call->num_slots, area[MAX_SLOTS];
    for (int k = 0; k < num_present; k++) {
        const REAL *row = frame + slots[k] * N, level = mean[slots[k]];
        uint64_t *plane = planes + slots[k] * words;
        area[slots[k]] = 0;
        for (int64_t word = 0; word < words; word++) {
            int size = (int)(N - word * 64 < 64 ? N - word * 64 : 64);
            uint8_t active[64] = {0};
            for (int i = 0; i < size; i++) active[i] = (row[word * 64 + i] > level) & valid[word * 64 + i];
            uint64_t bits = 0;
            for (int byte = 0; byte < 8; byte++) {
                uint64_t eight;
                memcpy(&eight, active + 8 * byte, 8);
                /* the highest byte of the product holds the lowest bits of the eight bytes */
                bits = bits << 8 | (eight * 0x0102040810204080u) >> 56;
            }
            plane[word] = bits;
            area[slots[k]] += __builtin_popcountll(bits);
        }
    }
    for (int k = 0; k < num_present; k++)
        for (int l = 0; l < k; l++) {
            const uint64_t *one = planes + slots[k] * words, *other = planes + slots[l] * words;
            int64_t both = 0;
            for (int64_t word = 0; word < words; word++) both += __builtin_popcountll(one[word] & other[word]);
            int64_t either = area[slots[k]] + area[slots[l]] - both;
            if (either) overlap[slots[k] * S + slots[l]] += (double)((REAL)both / (REAL)either);
        }
}

/* The memory of `find_slots` holds a frame, bit planes and a mask. */
static size_t TYPED(find_scratch)(const Call *call) {
    int64_t N = call->height * call->width;
    return sizeof(REAL) * call->num_slots * N + 8 * call->num_slots * ((N + 63) / 64) + call->num_frames * N + 1;
}

/* Steps 1 to 3 for a clip: computes labels before merging, and representatives. */
static int TYPED(find_slots)(const Call *call, int64_t b, void *memory) {
    int64_t N = call->height * call->width, T = call->num_frames, S = call->num_slots;
    int64_t num_valid = 0, num_frames = 0, area[MAX_SLOTS] = {0};
    uint64_t *planes = memory;
    REAL *scratch = (REAL *)(planes + S * ((N + 63) / 64)), mean[MAX_SLOTS];
    uint8_t *valid = (uint8_t *)(scratch + S * N);
    int8_t *enc_labels = call->hard + b * T * N, *dec_labels = enc_labels + call->num_clips * T * N;
    double totals[MAX_SLOTS] = {0}, overlap[MAX_SLOTS * MAX_SLOTS], threshold = (REAL)call->knobs[0];
    int slots[MAX_SLOTS], num_present = list_slots(call, b, slots), dirty = 0;

    if (!num_present) memset(enc_labels, NOT_TAUGHT, T * N), memset(dec_labels, NOT_TAUGHT, T * N);
    for (int64_t t = 0; t < T && num_present; t++) {
        uint8_t *counted = valid + t * N;
        read_bytes(call, &call->valid, b, t, counted);
        const REAL *enc = TYPED(read_frame)(call, &call->enc, b, t, scratch);
        dirty |= TYPED(hard_labels)(call, enc, slots, num_present, counted, enc_labels + t * N);
        TYPED(add_slots)(call, enc, slots, num_present, counted, totals);
        const REAL *dec = TYPED(read_frame)(call, &call->dec, b, t, scratch);
        dirty |= TYPED(hard_labels)(call, dec, slots, num_present, counted, dec_labels + t * N);
        int64_t before = num_valid;
        for (int64_t i = 0; i < N; i++) {
            int8_t label = enc_labels[t * N + i];
            if (label >= 0) area[label]++, num_valid++;
        }
        num_frames += num_valid > before;
    }
    call->dirty[b] = (uint8_t)dirty;

    memset(overlap, 0, sizeof(double) * S * S);
    if (threshold < INFINITY && num_valid) {
        for (int s = 0; s < S; s++) mean[s] = (REAL)(totals[s] / (double)num_valid);
        for (int64_t t = 0; t < T; t++) {
            const REAL *enc = TYPED(read_frame)(call, &call->enc, b, t, scratch);
            TYPED(count_overlap)(call, enc, slots, num_present, valid + t * N, mean, planes, overlap);
        }
        for (int i = 0; i < S * S; i++) overlap[i] = (REAL)(overlap[i] / (double)num_frames);
    }
    merge_slots((int)S, overlap, threshold, area, call->names + b * S);
    return 0;
}

/* The exponentials of a block of patches, and their sums. */
typedef struct {
    REAL exps[MAX_SLOTS][BLOCK]; /* of (logit - peak) / temperature; unset for absent slots */
    REAL peak[BLOCK];            /* the largest logit, or 0 if all are -inf */
    REAL own[BLOCK];             /* exponential of the target slot */
    REAL others[BLOCK];          /* sum of the exponentials of all other slots */
    REAL squares[BLOCK];         /* sum of their squares */
    int32_t illegal[BLOCK];      /* 1 if a present slot holds NaN or +inf */
    int32_t target[BLOCK];
} TYPED(Block);

static inline void TYPED(exponentials)(const REAL *block, int64_t N, const int *slots, int num_present,
                                       const int8_t *targets, int size, double temperature, TYPED(Block) *out) {
    REAL sharpness = (REAL)(1.4426950408889634 / temperature);
    for (int i = 0; i < size; i++) {
        out->peak[i] = -(REAL)INFINITY, out->own[i] = out->others[i] = out->squares[i] = 0;
        out->illegal[i] = 0, out->target[i] = targets[i];
    }
    for (int k = 0; k < num_present; k++) {
        const REAL *row = block + slots[k] * N;
        for (int i = 0; i < size; i++) {
            out->peak[i] = row[i] > out->peak[i] ? row[i] : out->peak[i];
            out->illegal[i] |= !(row[i] < (REAL)INFINITY);
        }
    }
    for (int i = 0; i < size; i++) out->peak[i] = out->peak[i] > -(REAL)INFINITY ? out->peak[i] : 0;
    for (int k = 0; k < num_present; k++) {
        const REAL *row = block + slots[k] * N;
        REAL *exps = out->exps[slots[k]];
        int32_t s = slots[k];
        for (int i = 0; i < size; i++) {
            REAL value = TYPED(power_of_two)((row[i] - out->peak[i]) * sharpness);
            int is_target = out->target[i] == s;
            REAL wrong = is_target ? 0 : value;
            exps[i] = value;
            out->own[i] = is_target ? value : out->own[i];
            out->others[i] += wrong;
            out->squares[i] += wrong * wrong;
        }
    }
}

/* The error is r^2 + Q with r = sum_{s != y} P_s and Q = sum_{s != y} P_s^2, which avoids cancellation. Its gradient,
   divided by 2 / tau, is -P_y (r^2 + Q) at y and P_s (P_s + P_y r - Q) elsewhere. If all logits are -inf, P is uniform
   and the gradient is 0. */
static inline void TYPED(squared_error)(const TYPED(Block) *in, int64_t N, const int *slots, int num_present, int size,
                                        REAL scale, REAL *error, REAL *grad) {
    REAL inverse[BLOCK], excess[BLOCK];
    for (int i = 0; i < size; i++) {
        REAL total = in->own[i] + in->others[i], by = total > 0 ? 1 / total : 0;
        REAL r = in->others[i] * by, q = in->squares[i] * by * by;
        error[i] = total > 0 ? r * r + q : (REAL)(num_present - 1) / num_present;
        inverse[i] = in->target[i] >= 0 ? by : 0;
        excess[i] = in->own[i] * by * r - q;
    }
    for (int k = 0; grad && k < num_present; k++) {
        REAL *to = grad + slots[k] * N;
        const REAL *exps = in->exps[slots[k]];
        int32_t s = slots[k];
        for (int i = 0; i < size; i++) {
            REAL p = exps[i] * inverse[i];
            to[i] = scale * p * (in->target[i] == s ? -error[i] : p + excess[i]);
        }
    }
}

/* The error is -(1 - e) log P_y - (e / S) sum_s log P_s. If the logit of s is -inf, P_s is the smallest normal float.
   With q_s = (1 - e) 1[s = y] + e / S, the gradient divided by 1 / tau is P_s sum_k q_k - q_s. The sum leaves out slots
   at -inf, whose gradient is 0. */
static inline void TYPED(cross_entropy)(const TYPED(Block) *in, const REAL *block, int64_t N, const int *slots,
                                        int num_present, int size, double smoothing, double temperature, REAL scale,
                                        REAL *error, REAL *grad) {
    REAL aim = (REAL)(1 - smoothing), share = (REAL)(smoothing / num_present), log_tiny = (REAL)-87.33654475055310;
    REAL log_total[BLOCK], aims[BLOCK], possible[BLOCK], unmet[BLOCK];
    for (int i = 0; i < size; i++) {
        REAL total = in->own[i] + in->others[i];
        /* if the exponential of the target is 1, a sum would round off the others, which make up the loss */
        log_total[i] = (REAL)(in->own[i] == 1 ? log1p((double)in->others[i]) : log((double)total));
        error[i] = aims[i] = 0;
        possible[i] = total > 0, unmet[i] = aim;
    }
    for (int k = 0; k < num_present; k++) {
        const REAL *row = block + slots[k] * N;
        for (int i = 0; i < size; i++) {
            int is_possible = row[i] > -(REAL)INFINITY;
            REAL below = (row[i] - in->peak[i]) / (REAL)temperature;
            REAL log_prob = is_possible ? below - log_total[i] : log_tiny;
            REAL aimed = (in->target[i] == slots[k] ? aim : 0) + share;
            error[i] -= aimed > 0 ? aimed * log_prob : 0;
            unmet[i] = in->target[i] == slots[k] ? 0 : unmet[i];
            aims[i] += is_possible ? aimed : 0;
        }
    }
    /* an absent target slot has the log-probability of a slot at -inf */
    for (int i = 0; i < size; i++) error[i] -= unmet[i] * log_tiny;
    for (int i = 0; i < size; i++) error[i] = possible[i] > 0 ? error[i] : (REAL)log((double)num_present);
    for (int k = 0; grad && k < num_present; k++) {
        const REAL *row = block + slots[k] * N, *exps = in->exps[slots[k]];
        REAL *to = grad + slots[k] * N;
        for (int i = 0; i < size; i++) {
            REAL total = in->own[i] + in->others[i], p = exps[i] / (total > 0 ? total : 1);
            REAL aimed = (in->target[i] == slots[k] ? aim : 0) + share;
            int learns = row[i] > -(REAL)INFINITY && in->target[i] >= 0;
            to[i] = learns ? scale * (p * aims[i] - aimed) : 0;
        }
    }
}

/* Step 5 for a frame of one map: returns the sum of the values, and writes them unless `values` is NULL. The value and
   the gradient of a patch are 0 if it has no target. Else they are NaN if it holds NaN or +inf, or its target is no
   slot. */
static double TYPED(teach_frame)(const Call *call, const Tensor *map, int64_t b, int64_t t, const int8_t *targets,
                                 double scale, REAL *grads, REAL *values, REAL *scratch) {
    int64_t N = call->height * call->width, S = call->num_slots;
    int slots[MAX_SLOTS], num_present = list_slots(call, b, slots);
    const REAL *frame = NULL;
    double sum = 0;
    REAL *grad_frame = grads ? grads + (b * call->num_frames + t) * S * N : NULL;
    TYPED(Block) block;
    for (int64_t start = 0; start < N; start += BLOCK) {
        int size = (int)(N - start < BLOCK ? N - start : BLOCK), any = 0;
        REAL error[BLOCK], *grad = grad_frame ? grad_frame + start : NULL;
        for (int i = 0; i < size; i++) any |= targets[start + i] != NOT_TAUGHT;
        if (!any || num_present < S)
            for (int64_t s = 0; grad && s < S; s++) memset(grad + s * N, 0, size * sizeof(REAL));
        if (!any || !num_present) {
            if (values) memset(values + start, 0, size * sizeof(REAL));
            continue;
        }
        if (!frame) frame = TYPED(read_frame)(call, map, b, t, scratch);
        TYPED(exponentials)(frame + start, N, slots, num_present, targets + start, size, call->temperature, &block);
        if (call->cross_entropy)
            TYPED(cross_entropy)(&block, frame + start, N, slots, num_present, size, call->label_smoothing,
                                 call->temperature, (REAL)scale, error, grad);
        else
            TYPED(squared_error)(&block, N, slots, num_present, size, (REAL)scale, error, grad);
        REAL lanes[LANES] = {0};
        int undefined = 0;
        for (int i = 0; i < size; i++) {
            int taught = block.target[i] != NOT_TAUGHT, no_value = block.illegal[i] || block.target[i] == NO_SLOT;
            error[i] = !taught ? 0 : no_value ? (REAL)NAN : error[i];
            undefined |= taught & no_value;
        }
        for (int i = 0; i < size; i++) lanes[i % LANES] += error[i];
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        for (int64_t s = 0; undefined && grad && s < S; s++)
            for (int i = 0; i < size; i++)
                if (error[i] != error[i]) grad[s * N + i] = (REAL)NAN;
        if (values) memcpy(values + start, error, size * sizeof(REAL));
    }
    return sum;
}

/* The first half of the tasks are frames of the decoder's map, the second half of the encoder's. */
static int TYPED(teach_task)(const Call *call, int64_t task, void *memory) {
    int64_t frames = call->num_clips * call->num_frames, N = call->height * call->width, frame = task % frames;
    int map = task >= frames;
    REAL *grads = map ? call->grad_enc : call->grad_dec;
    if (grads && call->scales[map] != call->scales[map]) {
        for (int64_t i = 0; i < call->num_slots * N; i++) grads[frame * call->num_slots * N + i] = (REAL)NAN;
        return 0;
    }
    call->sums[task] =
        TYPED(teach_frame)(call, map ? &call->enc : &call->dec, frame / call->num_frames, frame % call->num_frames,
                           call->targets + task * N, call->scales[map], grads, NULL, memory);
    return 0;
}

static int TYPED(label_clip)(const Call *call, int64_t b, void *memory) {
    if (!call->given) TYPED(find_slots)(call, b, memory);
    return select_clip(call, b, memory);
}

/* Computes labels of both maps before merging, and representatives. */
int TYPED(ssync_find)(Call *call) {
    call->dirty = calloc(call->num_clips + 1, 1);
    int failed = !call->dirty || run(TYPED(find_slots), call, call->num_clips, TYPED(find_scratch)(call));
    if (!failed) *call->found_clean = !is_dirty(call);
    free(call->dirty);
    return failed;
}

/* Computes merged labels and regions, and both means and their gradients unless `boundary_mean` is NULL. `hard` and
   `names` are inputs unless they are NULL. */
int TYPED(ssync_step)(Call *call) {
    int64_t frames = call->num_clips * call->num_frames, N = call->height * call->width, S = call->num_slots;
    int8_t *own = NULL;
    call->given = call->hard != NULL;
    size_t to_find = call->given ? 0 : TYPED(find_scratch)(call), to_select = select_scratch(call);
    if (!call->given) call->hard = own = malloc(2 * frames * N + call->num_clips * S + 1);
    if (own) call->names = own + 2 * frames * N;
    call->targets = malloc(2 * frames * N + 1);
    call->sums = calloc(2 * frames + 1, sizeof(double));
    call->selected = calloc(2 * call->num_clips + 1, sizeof(int64_t));
    call->dirty = calloc(call->num_clips + 1, 1);
    int failed = !call->hard || !call->targets || !call->sums || !call->selected || !call->dirty;
    failed = failed || run(TYPED(label_clip), call, call->num_clips, to_find > to_select ? to_find : to_select);
    if (!failed && call->boundary_mean) {
        int dirty = is_dirty(call);
        double by[2];
        for (int map = 0; map < 2; map++) {
            by[map] = divisor(call, map, &call->counts[map]);
            double steepness = (call->cross_entropy ? 1 : 2) / call->temperature;
            call->scales[map] = dirty ? NAN : call->knobs[1 + map] * steepness / by[map];
        }
        failed = run(TYPED(teach_task), call, 2 * frames, sizeof(REAL) * S * N + 1);
        REAL means[2];
        for (int map = 0; map < 2; map++) {
            double sum = 0;
            for (int64_t i = 0; i < frames; i++) sum += call->sums[map * frames + i];
            means[map] = (REAL)(dirty ? NAN : call->knobs[1 + map] * (sum / by[map]));
        }
        *(REAL *)call->boundary_mean = call->interior_mean ? means[0] : means[0] + means[1];
        if (call->interior_mean) *(REAL *)call->interior_mean = means[1];
    }
    free(call->targets), free(call->sums), free(call->selected), free(call->dirty), free(own);
    if (!call->given) call->hard = call->names = NULL;
    return failed;
}

/* Computes the targets of a frame from labels and a region. */
static int TYPED(target_task)(const Call *call, int64_t frame, void *memory) {
    int64_t N = call->height * call->width, b = frame / call->num_frames, t = frame % call->num_frames, number = 0;
    int slots[MAX_SLOTS], has_slots = list_slots(call, b, slots) > 0;
    uint8_t *region = memory;
    int8_t *targets = call->targets + frame * N;
    const int64_t *strides = call->target.strides;
    const int64_t *labels = (const int64_t *)call->target.data + frame_offset(&call->target, b, t);
    read_bytes(call, &call->region, b, t, region);
    for (int64_t h = 0, i = 0; h < call->height; h++)
        for (int64_t w = 0; w < call->width; w++, i++) {
            int64_t label = labels[h * strides[3] + w * strides[4]];
            int in_range = label >= 0 && label < call->num_slots;
            targets[i] = !region[i] || !has_slots ? NOT_TAUGHT : in_range ? (int8_t)label : NO_SLOT;
            number += targets[i] != NOT_TAUGHT;
        }
    /* every frame has its own count, because threads must not share one */
    call->sums[frame] = (double)number;
    return 0;
}

static int TYPED(distill_task)(const Call *call, int64_t frame, void *memory) {
    int64_t N = call->height * call->width, b = frame / call->num_frames, t = frame % call->num_frames;
    int slots[MAX_SLOTS], number = list_slots(call, b, slots);
    double scale = call->scales[0];
    REAL *values = call->reduction == 0 ? (REAL *)call->values + frame * N : NULL;
    /* the value of a patch is a mean over slots; for the mean over a batch, `scale` includes the number of slots */
    double over = call->reduction == 2 || call->cross_entropy || !number ? 1 : number;
    double sum = TYPED(teach_frame)(call, &call->enc, b, t, call->targets + frame * N, scale / over, call->grad_enc,
                                    values, memory);
    for (int64_t i = 0; values && i < N; i++) values[i] /= (REAL)over;
    call->sums[frame] = sum / over;
    return 0;
}

/* Computes the distillation loss of one map, and its gradient. */
int TYPED(ssync_distill)(Call *call) {
    int64_t frames = call->num_clips * call->num_frames, N = call->height * call->width, selected;
    call->targets = malloc(frames * N + 1);
    call->sums = calloc(frames + 1, sizeof(double));
    call->selected = calloc(call->num_clips + 1, sizeof(int64_t));
    int failed = !call->targets || !call->sums || !call->selected;
    failed = failed || run(TYPED(target_task), call, frames, N + 1);
    if (!failed) {
        for (int64_t i = 0; i < frames; i++) call->selected[i / call->num_frames] += (int64_t)call->sums[i];
        double by = divisor(call, 0, &selected);
        by = call->reduction == 2 ? by : 1;
        call->scales[0] = (call->cross_entropy ? 1 : 2) / call->temperature / by;
        failed = run(TYPED(distill_task), call, frames, sizeof(REAL) * call->num_slots * N + 1);
        double sum = 0;
        for (int64_t i = 0; i < frames; i++) sum += call->sums[i];
        if (call->reduction) *(REAL *)call->values = (REAL)(sum / by);
    }
    free(call->targets), free(call->sums), free(call->selected);
    return failed;
}

/* Multiplies a frame of a gradient by the incoming gradient, which is one number or one per patch. Writes the result in
   the type of the map. */
static int TYPED(scale_task)(const Call *call, int64_t frame, void *memory) {
    int64_t N = call->height * call->width, S = call->num_slots;
    const REAL *from = (const REAL *)call->enc.data + frame * S * N;
    const REAL *by = (const REAL *)call->values + (call->reduction ? 0 : frame * N);
    (void)memory;
#define SCALE(TYPE, NARROW)                                                                               \
    {                                                                                                     \
        TYPE *to = (TYPE *)call->grad_enc + frame * S * N;                                                \
        for (int64_t s = 0; s < S; s++, from += N, to += N)                                               \
            for (int64_t i = 0; i < N; i++) to[i] = (TYPE)NARROW(from[i] * (call->reduction ? *by : by[i])); \
    }
    if (call->kind == FLOAT) SCALE(float, )
    else if (call->kind == DOUBLE) SCALE(double, )
    else if (call->kind == HALF) SCALE(uint16_t, to_half)
    else SCALE(uint16_t, to_bfloat)
#undef SCALE
    return 0;
}

int TYPED(ssync_scale)(Call *call) { return run(TYPED(scale_task), call, call->num_clips * call->num_frames, 1); }

#endif /* REAL */
