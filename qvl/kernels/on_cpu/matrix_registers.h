/* Registers for matrices (AMX): eight of 16 rows of 64 bytes. How a process gets them, fills and reads them; with
 * REGISTERS_IN_C the same in C, for tests. Registers 0 to 3 hold sums. Does not know what is multiplied.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#if !defined(REGISTERS_IN_C)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CONFIGURE(how) _tile_loadconfig(how)
#define RELEASE() _tile_release()
#define CLEAR(r) _tile_zero(r)
#define FILL(r, from) _tile_loadd(r, from, 64)
#define KEEP(r, to) _tile_stored(r, to, 64)
#define SETTLE() __asm__ volatile("" ::: "memory") /* stores come before what reads them without the compiler's knowing */

/* Linux gives a process these registers when it asks (ARCH_REQ_XCOMP_PERM, XTILEDATA), if it has them. */
static int has_registers(void) {
    static _Atomic int state; /* 0: not asked yet; threads that ask at once get the same answer */
    if (!state) state = syscall(SYS_arch_prctl, 0x1023, 18) ? -1 : 1;
    return state > 0;
}
#else
#define CONFIGURE(how) ((void)(how))
#define RELEASE() ((void)0)
#define CLEAR(r) memset(matrix_registers[r], 0, 1024)
#define FILL(r, from) memcpy(matrix_registers[r], from, 1024)
#define KEEP(r, to) memcpy(to, matrix_registers[r], 1024)
#define SETTLE() ((void)0)
static _Thread_local uint32_t matrix_registers[8][16][16];
static int has_registers(void) { return 1; }
#endif

/* All registers have 16 rows of 64 bytes; until RELEASE. */
static inline void configure_registers(void) {
    static const struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } how = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    CONFIGURE(&how);
}

static inline void clear_sums(void) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
}
