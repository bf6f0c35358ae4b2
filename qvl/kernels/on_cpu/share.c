/* Threads that take pieces of a call's work, beside the thread that calls.
 *
 * The caller takes pieces until none is left, then waits for those that others have begun: never for a thread that has
 * not come. So a helper that sleeps, or whose core another process has, costs nothing but its help. Calls of a step
 * follow each other within microseconds: a helper looks out for the next one for AWAKE nanoseconds, and sleeps then.
 * Does not know what the work is.
 */
#define _GNU_SOURCE
#include "share.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define AWAKE 200000L   /* nanoseconds that a helper looks out for the next call */
#define PATIENT 100000L /* nanoseconds that the caller looks out for the last pieces before it sleeps */
#define MOST 1024       /* helpers */
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif
#define APART __attribute__((aligned(128))) /* on a cache line of its own */

static share_work *work;
static const void *what;
static long count;
static APART atomic_long next;      /* the first piece that nobody has taken */
static APART atomic_uint calls;     /* one more with each call: what helpers look out for */
static APART atomic_int inside;     /* helpers that may be at work */
static APART atomic_int open_seats; /* helpers that may still join this call; none when it is over */
static atomic_int asleep, waiting;  /* whether some helper sleeps; whether the caller does */
static int helpers;
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER, bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void take_pieces(void) {
    for (long piece; (piece = atomic_fetch_add(&next, 1)) < count;) work(what, piece);
}

/* The number of a call that is not `seen`. */
static unsigned await_call(unsigned seen) {
    for (long start = now(); now() - start < AWAKE; sched_yield())
        for (int i = 0; i < 32; i++) {
            if (atomic_load(&calls) != seen) return atomic_load(&calls);
            PAUSE();
        }
    pthread_mutex_lock(&bed);
    while (atomic_store(&asleep, 1), atomic_load(&calls) == seen) pthread_cond_wait(&called, &bed);
    pthread_mutex_unlock(&bed);
    return atomic_load(&calls);
}

static void *help(void *first) {
    for (unsigned seen = (unsigned)(size_t)first;;) {
        seen = await_call(seen);
        atomic_fetch_add(&inside, 1); /* before looking for a seat: the caller closes them, then looks who is inside */
        if (atomic_fetch_sub(&open_seats, 1) > 0) take_pieces();
        if (atomic_fetch_sub(&inside, 1) == 1 && atomic_load(&waiting)) {
            pthread_mutex_lock(&bed);
            pthread_cond_signal(&finished);
            pthread_mutex_unlock(&bed);
        }
    }
    return 0;
}

static void await_helpers(void) {
    for (long start = now(); now() - start < PATIENT; sched_yield())
        for (int i = 0; i < 32; i++) {
            if (!atomic_load(&inside)) return;
            PAUSE();
        }
    pthread_mutex_lock(&bed);
    while (atomic_store(&waiting, 1), atomic_load(&inside)) pthread_cond_wait(&finished, &bed);
    atomic_store(&waiting, 0);
    pthread_mutex_unlock(&bed);
}

/* A forked process has none of the threads. */
static void alone(void) {
    helpers = 0;
    atomic_store(&inside, 0), atomic_store(&open_seats, 0), atomic_store(&asleep, 0), atomic_store(&waiting, 0);
    pthread_mutex_init(&one_caller, 0), pthread_mutex_init(&bed, 0);
    pthread_cond_init(&called, 0), pthread_cond_init(&finished, 0);
}

/* So many helpers, or as many as there can be. Signals are for the threads that there were before. */
static void hire(int wanted) {
    static int prepared;
    sigset_t all, before;
    if (!prepared) prepared = 1, pthread_atfork(0, 0, alone);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; helpers < wanted && helpers < MOST; helpers++) {
        if (pthread_create(&thread, 0, help, (void *)(size_t)atomic_load(&calls))) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void qvl_share(long pieces, int threads, share_work *do_piece, const void *about) {
    if (threads > pieces) threads = (int)pieces;
    if (threads <= 1 || pthread_mutex_trylock(&one_caller)) { /* others call too: they have the helpers */
        for (long i = 0; i < pieces; i++) do_piece(about, i);
        return;
    }
    if (helpers < threads - 1) hire(threads - 1);
    work = do_piece, what = about, count = pieces;
    atomic_store(&next, 0);
    atomic_store(&open_seats, threads - 1);
    atomic_fetch_add(&calls, 1);
    if (atomic_exchange(&asleep, 0)) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&called);
        pthread_mutex_unlock(&bed);
    }
    take_pieces();
    atomic_store(&open_seats, 0);
    if (atomic_load(&inside)) await_helpers();
    pthread_mutex_unlock(&one_caller);
}
