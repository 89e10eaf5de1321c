// What a compiled program pays: reading and writing files, and calls on one open libvirt connection.
//
// Obeys one line at a time and answers each with one line of nanoseconds: of every call, in the order in which they were
// made. Exits with a sentence when something fails, since a benchmark that went on would lie.
//
//   pin CPU                    run on this processor only; -1: on any
//   read COUNT PATH            open, read and close a file
//   states DIRECTORY NAME      the file NAME of every directory in DIRECTORY, once; the second number is how many
//   slurp PATH                 a whole file, once; the second number is its length
//   write COUNT PATH ONE TWO   open, write and close, ONE and TWO in turn
//   connect URI                a connection for what follows; the second number is how many domains there are
//   state COUNT UUID           virDomainGetState
//   stats                      virConnectGetAllDomainStats of all states; the second number is how many
//   power COUNT UUID           virDomainSuspend and virDomainResume in turn
//   wake COUNT UUID PATH       the same; from libvirt's event in this process to the inotify event of PATH in it
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <time.h>
#include <unistd.h>

static virConnectPtr connection;
static char *connected_to;
static char buffer[1 << 20];

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("probe: ", stderr);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (%s)\n", strerror(errno));
    exit(1);
}

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int each = 0; each < CPU_SETSIZE; each++)
        if (cpu < 0 || each == cpu)
            CPU_SET(each, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("cannot run on processor %d only", cpu);
    puts("0");
}

// Bytes of the file, at most as many as the buffer has.
static size_t read_file(int directory, const char *path)
{
    int file = openat(directory, path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        fail("cannot open %s", path);
    ssize_t length = read(file, buffer, 65536);
    if (length < 0)
        fail("cannot read %s", path);
    close(file);
    return length;
}

static void read_often(int count, const char *path)
{
    for (int index = 0; index < count; index++) {
        long long begun = now();
        read_file(AT_FDCWD, path);
        printf("%lld ", now() - begun);
    }
    puts("");
}

static void states(const char *path, const char *name)
{
    long long begun = now();
    long count = 0;
    DIR *directory = opendir(path);
    if (!directory)
        fail("cannot open %s", path);
    for (struct dirent *entry; (entry = readdir(directory));) {
        char file[512];
        if (entry->d_name[0] == '.' || entry->d_type != DT_DIR)
            continue;
        snprintf(file, sizeof file, "%s/%s", entry->d_name, name);
        read_file(dirfd(directory), file);
        count++;
    }
    closedir(directory);
    printf("%lld %ld\n", now() - begun, count);
}

static void slurp(const char *path)
{
    long long begun = now();
    size_t length = 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        fail("cannot open %s", path);
    for (ssize_t got; (got = read(file, buffer, sizeof buffer)); length += got)
        if (got < 0)
            fail("cannot read %s", path);
    close(file);
    printf("%lld %zu\n", now() - begun, length);
}

static void write_often(int count, const char *path, const char *one, const char *two)
{
    for (int index = 0; index < count; index++) {
        const char *value = index % 2 ? two : one;
        char line[64];
        int length = snprintf(line, sizeof line, "%s\n", value);
        long long begun = now();
        int file = open(path, O_WRONLY | O_CLOEXEC);
        if (file < 0 || write(file, line, length) != length || close(file))
            fail("cannot write %s to %s", value, path);
        printf("%lld ", now() - begun);
    }
    puts("");
}

static void connect_to(const char *uri)
{
    long long begun = now();
    if (connection)
        virConnectClose(connection);
    connection = virConnectOpen(uri);
    free(connected_to);
    connected_to = strdup(uri);
    int count = connection ? virConnectNumOfDefinedDomains(connection) + virConnectNumOfDomains(connection) : -1;
    // Whoever waits for a libvirtd asks again.
    printf("%lld %d\n", now() - begun, count);
}

static virDomainPtr domain_of(const char *uuid)
{
    virDomainPtr domain = connection ? virDomainLookupByUUIDString(connection, uuid) : NULL;
    if (!domain)
        fail("there is no domain %s", uuid);
    return domain;
}

static void state_often(int count, const char *uuid)
{
    virDomainPtr domain = domain_of(uuid);
    for (int index = 0; index < count; index++) {
        int state, reason;
        long long begun = now();
        if (virDomainGetState(domain, &state, &reason, 0))
            fail("no state of %s", uuid);
        printf("%lld ", now() - begun);
    }
    puts("");
    virDomainFree(domain);
}

static void stats(void)
{
    virDomainStatsRecordPtr *records;
    long long begun = now();
    int count = virConnectGetAllDomainStats(connection, VIR_DOMAIN_STATS_STATE, &records, 0);
    if (count < 0)
        fail("no statistics");
    printf("%lld %d\n", now() - begun, count);
    virDomainStatsRecordListFree(records);
}

static void change(virDomainPtr domain, int index)
{
    if (index % 2 ? virDomainResume(domain) : virDomainSuspend(domain))
        fail("cannot suspend or resume: %s", virGetLastErrorMessage());
}

static void power_often(int count, const char *uuid)
{
    virDomainPtr domain = domain_of(uuid);
    for (int index = 0; index < count; index++) {
        long long begun = now();
        change(domain, index);
        printf("%lld ", now() - begun);
    }
    puts("");
    virDomainFree(domain);
}

static atomic_llong heard, awake;

static void lifecycle(virConnectPtr from, virDomainPtr domain, int event, int detail, void *opaque)
{
    (void)from, (void)domain, (void)detail, (void)opaque;
    if (event == VIR_DOMAIN_EVENT_SUSPENDED || event == VIR_DOMAIN_EVENT_RESUMED)
        atomic_store(&heard, now());
}

static void *dispatch(void *nothing)
{
    while (!virEventRunDefaultImpl())
        ;
    return nothing;
}

static void *watch(void *descriptor)
{
    char events[4096];
    while (read(*(int *)descriptor, events, sizeof events) > 0)
        atomic_store(&awake, now());
    return NULL;
}

static void wake_often(int count, const char *uuid, const char *path)
{
    static int notify = -1;
    static pthread_t dispatching, watching;
    if (notify < 0) {
        notify = inotify_init1(IN_CLOEXEC);
        if (inotify_add_watch(notify, path, IN_MODIFY) < 0)
            fail("cannot watch %s", path);
        // Of its own, so that no call in progress delays or delivers its events.
        virConnectPtr listening = virConnectOpen(connected_to);
        if (!listening || virConnectDomainEventRegisterAny(listening, NULL, VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                                                           VIR_DOMAIN_EVENT_CALLBACK(lifecycle), NULL, NULL) < 0)
            fail("no events");
        pthread_create(&dispatching, NULL, dispatch, NULL);
        pthread_create(&watching, NULL, watch, &notify);
    }
    virDomainPtr domain = domain_of(uuid);
    for (int index = 0; index < count; index++) {
        atomic_store(&heard, 0);
        atomic_store(&awake, 0);
        change(domain, index);
        long long deadline = now() + 10000000000LL;
        while (!atomic_load(&heard) || !atomic_load(&awake)) {
            if (now() > deadline)
                fail("change %d of %s was %s", index, path, heard ? "not announced" : "not heard of");
            usleep(200);
        }
        printf("%lld ", awake - heard);
        // A file is announced at most once in so long: a later change within it waits, which is not what is measured.
        usleep(60000);
    }
    puts("");
    virDomainFree(domain);
}

// libvirt's own way of telling errors: whoever waits for a libvirtd meets many.
static void silence(void *nothing, virErrorPtr error)
{
    (void)nothing, (void)error;
}

int main(void)
{
    char *line = NULL;
    size_t room = 0;
    // Closing a connection whose libvirtd has ended writes to it.
    signal(SIGPIPE, SIG_IGN);
    virEventRegisterDefaultImpl();
    virSetErrorFunc(NULL, silence);
    while (getline(&line, &room, stdin) > 0) {
        char *word = strtok(line, " \n"), *one = strtok(NULL, " \n"), *two = strtok(NULL, " \n");
        char *three = strtok(NULL, " \n"), *four = strtok(NULL, " \n");
        if (!strcmp(word, "pin") && one)
            pin(atoi(one));
        else if (!strcmp(word, "read") && two)
            read_often(atoi(one), two);
        else if (!strcmp(word, "states") && two)
            states(one, two);
        else if (!strcmp(word, "slurp") && one)
            slurp(one);
        else if (!strcmp(word, "write") && four)
            write_often(atoi(one), two, three, four);
        else if (!strcmp(word, "connect") && one)
            connect_to(one);
        else if (!strcmp(word, "state") && two)
            state_often(atoi(one), two);
        else if (!strcmp(word, "stats"))
            stats();
        else if (!strcmp(word, "power") && two)
            power_often(atoi(one), two);
        else if (!strcmp(word, "wake") && three)
            wake_often(atoi(one), two, three);
        else
            fail("not understood: %s", word);
        fflush(stdout);
    }
    free(line);
    return 0;
}
