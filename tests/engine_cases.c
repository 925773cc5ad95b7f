/* Draws cases for the CPU engine, to be compiled with sanitizers: every array is as large as it has to be, so that a
   read or a write beside it is seen. Compares one thread with several to the bit. */

#define CELLS_PER_THREAD 1
#define CELLS_FOR_A_TEAM 1
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* The largest piece of working memory that the engine asked for. */
static atomic_size_t largest;

static void *noted(size_t size) {
    for (size_t before = largest; size > before && !atomic_compare_exchange_weak(&largest, &before, size);) {}
    return malloc(size);
}

#define malloc noted
#include "engine.c"
#undef malloc

static uint64_t state;

static uint64_t draw(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
}

static int64_t below(int64_t limit) { return (int64_t)(draw() % (uint64_t)limit); }

static size_t size_of(int64_t kind) { return kind == DOUBLE ? 8 : kind == FLOAT ? 4 : 2; }

/* A map, slots last in memory or first, with ties, -inf, and now and then NaN or +inf. */
static Tensor draw_map(const Call *call, int64_t kind) {
    int64_t B = call->num_clips, T = call->num_frames, S = call->num_slots, H = call->height, W = call->width;
    int64_t size = B * T * S * H * W;
    Tensor map = {malloc(size ? size * size_of(kind) : 1), kind, {T * S * H * W, S * H * W, H * W, W, 1}};
    if (below(2)) memcpy(map.strides, (int64_t[]){T * S * H * W, S * H * W, 1, S * W, S}, sizeof map.strides);
    int64_t coarse = below(2), dirty = below(8) == 0;
    for (int64_t i = 0; i < size; i++) {
        double value = coarse ? (double)below(5) - 2 : (double)below(1 << 20) / (1 << 16) - 8;
        if (below(20) == 0) value = -INFINITY;
        if (dirty && below(50) == 0) value = below(2) ? INFINITY : NAN;
        if (kind == FLOAT) ((float *)map.data)[i] = (float)value;
        if (kind == DOUBLE) ((double *)map.data)[i] = value;
        if (kind == HALF) ((uint16_t *)map.data)[i] = to_half((float)value);
        if (kind == BFLOAT) ((uint16_t *)map.data)[i] = to_bfloat((float)value);
    }
    return map;
}

static Tensor draw_bytes(const Call *call, int64_t items, int64_t limit) {
    int64_t H = call->height, W = call->width, T = call->num_frames, size = call->num_clips * T * H * W;
    Tensor tensor = {malloc(size ? size * items : 1), 0, {T * H * W, H * W, 0, W, 1}};
    for (int64_t i = 0; i < size; i++) {
        if (items == 1) ((uint8_t *)tensor.data)[i] = below(limit) != 0;
        else ((int64_t *)tensor.data)[i] = below(limit) - (below(30) == 0);
    }
    return tensor;
}

/* All outputs of a call, in one buffer each. */
enum { OUTPUTS = 11 };

static void allocate(Call *call, size_t real, void *outputs[OUTPUTS], size_t sizes[OUTPUTS]) {
    size_t patches = call->num_clips * call->num_frames * call->height * call->width, cells = patches * call->num_slots;
    size_t wanted[OUTPUTS] = {real, real, 16, cells * real, cells * real, patches * 8, patches * 8,
                              call->num_clips * call->num_slots * 8, patches, patches,
                              call->reduction ? real : patches * real};
    for (int i = 0; i < OUTPUTS; i++) sizes[i] = wanted[i], outputs[i] = calloc(wanted[i] ? wanted[i] : 1, 1);
    call->boundary_mean = outputs[0], call->interior_mean = outputs[1], call->counts = outputs[2];
    call->grad_enc = outputs[3], call->grad_dec = outputs[4], call->enc_labels = outputs[5];
    call->dec_labels = outputs[6], call->representative = outputs[7], call->boundary = outputs[8];
    call->interior = outputs[9], call->values = outputs[10];
}

typedef struct {
    void (*function)(void *);
    void *data;
} Job;

static void *do_job(void *job) {
    ((Job *)job)->function(((Job *)job)->data);
    return NULL;
}

static void team(void (*function)(void *), void *data, unsigned num_threads, unsigned flags) {
    pthread_t members[MAX_THREADS];
    Job job = {function, data};
    (void)flags;
    for (unsigned i = 1; i < num_threads; i++) pthread_create(&members[i], NULL, do_job, &job);
    do_job(&job);
    for (unsigned i = 1; i < num_threads; i++) pthread_join(members[i], NULL);
}

static int run_case(uint64_t seed) {
    state = seed * 2654435761u + 1;
    for (int i = 0; i < 8; i++) draw();
    Call call = {.num_clips = below(4), .num_frames = 1 + below(3), .num_slots = 1 + below(below(8) ? 6 : 64)};
    call.height = 1 + below(9), call.width = 1 + below(below(6) ? 9 : 80);
    int64_t kinds[2] = {below(4), below(4)}, is_double = kinds[0] == DOUBLE || kinds[1] == DOUBLE;
    size_t real = is_double ? 8 : 4;
    double knobs[3] = {below(4) ? (double)below(100) / 100 : INFINITY, (double)below(3) / 2, 1};
    uint8_t *slot_mask = NULL, clean = below(10) != 0;
    call.enc = draw_map(&call, kinds[0]), call.dec = draw_map(&call, kinds[1]);
    if (below(2)) call.valid = draw_bytes(&call, 1, 4);
    if (below(2)) {
        slot_mask = malloc(call.num_clips * call.num_slots + 1);
        for (int64_t i = 0; i < call.num_clips * call.num_slots; i++) slot_mask[i] = below(3) != 0;
    }
    call.slot_mask = slot_mask, call.clean = below(2) ? &clean : NULL, call.knobs = knobs;
    call.min_different = below(11), call.min_same = below(11), call.max_different = below(11);
    call.cross_entropy = below(2), call.label_smoothing = call.cross_entropy ? (double)below(3) / 2 : 0;
    call.temperature = below(8) ? 0.25 + below(4) : 1.2e-38;
    call.target = draw_bytes(&call, 8, call.num_slots), call.region = draw_bytes(&call, 1, 3);
    call.reduction = below(3), call.kind = below(4);

    int wrong = 0;
    int64_t function = below(3);
    int64_t summed = below(2);
    void *first[OUTPUTS], *second[OUTPUTS];
    size_t sizes[OUTPUTS];
    for (int pass = 0; pass < 2; pass++) {
        if (function == 2) call.reduction = 1;
        allocate(&call, real, pass ? second : first, sizes);
        if (summed) call.interior_mean = NULL;
        call.num_threads = pass ? 2 + below(4) : 1;
        call.team = below(2) ? team : NULL;
        if (function == 0) {
            /* the second time in two calls: what is found first is given */
            uint8_t found_clean, *before = (uint8_t *)call.clean;
            int64_t patches = call.num_clips * call.num_frames * call.height * call.width;
            int8_t *hard = malloc(2 * patches + 1), *names = malloc(call.num_clips * call.num_slots + 1);
            if (pass) {
                call.hard = hard, call.names = names, call.found_clean = &found_clean;
                wrong |= is_double ? ssync_find_f64(&call) : ssync_find_f32(&call);
                call.clean = &found_clean;
            }
            largest = 0;
            wrong |= is_double ? ssync_step_f64(&call) : ssync_step_f32(&call);
            /* with given labels: a clip to select, the targets, or a frame to teach */
            size_t clip = select_scratch(&call), frame = call.num_slots * call.height * call.width * real + 1;
            wrong |= pass && largest > clip && largest > frame && largest > (size_t)(2 * patches + 1);
            free(hard), free(names);
            call.hard = call.names = NULL, call.clean = before;
        }
        if (function == 1) {
            /* of the encoder's map alone */
            is_double = kinds[0] == DOUBLE;
            wrong |= is_double ? ssync_distill_f64(&call) : ssync_distill_f32(&call);
        }
        if (function == 2) {
            /* the gradient of the decoder's map, scaled into that of the encoder's */
            Tensor before = call.enc;
            double one = 1.5;
            float single = 1.5f;
            void *values = call.values;
            call.enc = (Tensor){call.grad_dec, is_double ? DOUBLE : FLOAT, {0}};
            call.values = is_double ? (void *)&one : (void *)&single;
            if (size_of(call.kind) > real) call.kind = FLOAT;
            wrong |= is_double ? ssync_scale_f64(&call) : ssync_scale_f32(&call);
            call.enc = before, call.values = values;
        }
    }
    for (int i = 0; i < OUTPUTS; i++) {
        wrong |= memcmp(first[i], second[i], sizes[i]) != 0;
        free(first[i]), free(second[i]);
    }
    free(call.enc.data), free(call.dec.data), free(call.valid.data), free(slot_mask);
    free(call.target.data), free(call.region.data);
    return wrong;
}

int main(int count, char **arguments) {
    int64_t cases = count > 1 ? atoll(arguments[1]) : 100;
    for (int64_t seed = 0; seed < cases; seed++)
        if (run_case((uint64_t)seed)) {
            printf("case %lld is wrong\n", (long long)seed);
            return 1;
        }
    printf("%lld cases\n", (long long)cases);
    return 0;
}
