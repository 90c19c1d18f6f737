package rig_test

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/internal/rig"
)

// TestCountInstructions counts loops of two lengths in a child, which is this test again.
func TestCountInstructions(t *testing.T) {
	const word, short, long = "KNARR_STEPPED", 1_000, 11_000
	loop := func(n int) {
		for range n {
			spinner++
		}
	}
	if os.Getenv(word) != "" {
		s, err := rig.NewStepped(os.Stdin, os.Stdout)
		require.NoError(t, err)
		for range 2 {
			require.NoError(t, s.Count("short", func() { loop(short) }))
			require.NoError(t, s.Count("long", func() { loop(long) }))
			require.NoError(t, s.Count("waits", func() { // for another thread, which does not count
				done := make(chan struct{})
				go func() { loop(100 * long); close(done) }()
				<-done
			}))
		}
		require.NoError(t, s.End())
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), word+"=1")
	got, err := rig.CountInstructions(cmd)
	if errors.Is(err, rig.ErrMayNotTrace) || errors.Is(err, rig.ErrTooSlow) {
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Log(got)
	perTurn := (got["long"] - got["short"]) / (long - short)
	require.GreaterOrEqual(t, perTurn, 2)
	require.LessOrEqual(t, perTurn, 10)
	require.Less(t, got["short"], short*(perTurn+1)+2000)
	require.Less(t, got["waits"], long*perTurn)
}

// TestCountInstructionsOfWhoFails: a child that ends early, which says why, and one that is killed meanwhile.
func TestCountInstructionsOfWhoFails(t *testing.T) {
	const word = "KNARR_STEPPED"
	if how := os.Getenv(word); how != "" {
		s, err := rig.NewStepped(os.Stdin, os.Stdout)
		require.NoError(t, err)
		require.NoError(t, s.Count("fails", func() {
			if how == "exit" {
				os.Exit(3)
			}
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}))
		return
	}
	for how, want := range map[string]string{"exit": "exit status 3", "kill": "signal: killed"} {
		cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), word+"="+how)
		_, err := rig.CountInstructions(cmd)
		if errors.Is(err, rig.ErrMayNotTrace) {
			t.Skip(err)
		}
		require.ErrorContains(t, err, want)
	}
}

// spinner keeps the compiler from leaving loops out.
var spinner int
