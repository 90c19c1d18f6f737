package sysctl

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/network/netns"
)

// TestLastOwnerPutsBack has two owners of one setting: the first that leaves changes nothing, the second puts the first value back.
func TestLastOwnerPutsBack(t *testing.T) {
	ns := filepath.Join(t.TempDir(), "ns")
	require.NoError(t, netns.Create(ns, nil))
	t.Cleanup(func() { _ = netns.Delete(ns) })
	dir := filepath.Join(t.TempDir(), "sysctl")
	a := Recorder{Dir: dir, Owner: "a", NetNS: ns}
	b := Recorder{Dir: dir, Owner: "b", NetNS: ns}
	const key = "net/ipv4/ip_forward"
	require.NoError(t, a.write(key, "0"))

	require.NoError(t, a.Set(key, "1"))
	require.NoError(t, b.Set(key, "1"))
	require.NoError(t, a.Set(key, "1"), "setting it again keeps the value of before")
	require.NoError(t, a.Restore())
	v, err := a.Get(key)
	require.NoError(t, err)
	require.Equal(t, "1", v)
	require.NoError(t, b.Restore())
	v, err = a.Get(key)
	require.NoError(t, err)
	require.Equal(t, "0", v)
	require.NoDirExists(t, dir)
	require.NoError(t, b.Restore(), "restoring twice is no error")
}
