//go:build cgo

package main

/*
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void knarr_pause_end(int sig) { _exit(0); }

// The pause process: the first process of a PID namespace that the containers
// of a pod share. It reaps what they leave and ends on SIGTERM or SIGINT. It
// runs before the Go runtime starts, so it costs a few pages.
__attribute__((constructor)) static void knarr_pause(int argc, char **argv, char **envp)
{
	if (argc < 2 || argv[1] == NULL || strcmp(argv[1], "pause") != 0)
		return;
	struct sigaction end = { .sa_handler = knarr_pause_end };
	sigaction(SIGTERM, &end, NULL);
	sigaction(SIGINT, &end, NULL);
	for (;;) {
		if (waitpid(-1, NULL, 0) < 0 && errno == ECHILD) {
			sigset_t set;
			int sig;
			sigemptyset(&set);
			sigaddset(&set, SIGCHLD);
			sigprocmask(SIG_BLOCK, &set, NULL);
			// A child may have come and gone before the block.
			if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
				sigwait(&set, &sig);
			sigprocmask(SIG_UNBLOCK, &set, NULL);
		}
	}
}
*/
import "C"
