package image

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

func spec(ref string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: ref} }

func TestCRI(t *testing.T) {
	r := newRegistry(t, false)
	img := small(t, 1)
	r.push(t, "app:1", img)
	s := openStore(t, Options{})
	c := s.CRI()
	ref := r.host + "/app:1"

	resp, err := c.ImageStatus(t.Context(), spec(ref), false)
	require.NoError(t, err)
	require.Nil(t, resp.Image, "absent: no error and no image")
	id, err := c.PullImage(t.Context(), spec(ref), nil, nil)
	require.NoError(t, err)
	require.Equal(t, imageID(t, img), id)
	for _, name := range []string{ref, id} {
		resp, err = c.ImageStatus(t.Context(), spec(name), true)
		require.NoError(t, err)
		require.Equal(t, id, resp.Image.Id)
		require.Equal(t, []string{ref}, resp.Image.RepoTags)
		require.Len(t, resp.Image.RepoDigests, 1)
		require.EqualValues(t, 1000, resp.Image.Uid.Value)
		require.False(t, resp.Image.Pinned)
		require.Contains(t, resp.Info["info"], `"Cmd":["/hello"]`)
	}
	importNoise(t, s, "pinned:1", 3, 1000)
	list, err := c.ListImages(t.Context(), nil)
	require.NoError(t, err)
	require.Len(t, list, 2)
	list, err = c.ListImages(t.Context(), &runtimeapi.ImageFilter{Image: spec("pinned:1")})
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.True(t, list[0].Pinned)
	list, err = c.ListImages(t.Context(), &runtimeapi.ImageFilter{Image: spec("absent:1")})
	require.NoError(t, err)
	require.Empty(t, list)

	fs, err := c.ImageFsInfo(t.Context())
	require.NoError(t, err)
	require.Equal(t, s.Root(), fs.ImageFilesystems[0].FsId.Mountpoint)
	require.Greater(t, fs.ImageFilesystems[0].UsedBytes.Value, uint64(200_000))
	require.Len(t, fs.ContainerFilesystems, 1)

	require.NoError(t, s.Tag(t.Context(), ref, "second:1"))
	require.NoError(t, c.RemoveImage(t.Context(), spec(ref)))
	require.NoError(t, c.RemoveImage(t.Context(), spec(ref)), "absent already")
	resp, err = c.ImageStatus(t.Context(), spec("second:1"), false)
	require.NoError(t, err)
	require.Nil(t, resp.Image, "the image goes with all of its names")
	require.NoError(t, c.Close(t.Context()))
}

// TestCRIPullErrors checks what pkg/kubelet/images makes of errors: the code, and how the text begins.
func TestCRIPullErrors(t *testing.T) {
	r := newRegistry(t, false)
	gone := newRegistry(t, false)
	gone.Close()
	s := openStore(t, Options{Resolver: deadResolver(t)})
	for _, tc := range []struct {
		name, ref string
		answer    int // by the registry, 0: its own
		code      codes.Code
		begins    string
		has       string
	}{
		{"absent", r.host + "/a:1", 0, codes.NotFound, "rpc error: code = NotFound desc = failed to pull and unpack image", "not found"},
		{"unauthorized", r.host + "/a:1", http.StatusUnauthorized, codes.Unauthenticated, "rpc error: code = Unauthenticated desc = failed to pull and unpack image", "401 Unauthorized"},
		{"forbidden", r.host + "/a:1", http.StatusForbidden, codes.Unauthenticated, "rpc error", "403 Forbidden"},
		{"unavailable", r.host + "/a:1", http.StatusServiceUnavailable, codes.Unavailable, "RegistryUnavailable: failed to pull", "503"},
		{"refused", gone.host + "/a:1", 0, codes.Unavailable, "rpc error: code = Unavailable desc = failed to pull and unpack image", "connection refused"},
		{"no such host", "does-not-exist.invalid/a:1", 0, codes.Unavailable, "rpc error: code = Unavailable", "lookup does-not-exist.invalid"},
		{"name", "A:B:C", 0, codes.InvalidArgument, "rpc error", "invalid image name"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r.guard.Store(nil)
			if tc.answer != 0 {
				r.setGuard(func(w http.ResponseWriter, _ *http.Request) bool {
					w.WriteHeader(tc.answer)
					return false
				})
			}
			_, err := s.CRI().PullImage(t.Context(), spec(tc.ref), &runtimeapi.AuthConfig{}, nil)
			require.Error(t, err)
			require.Equal(t, tc.code, status.Code(err), "%v", err)
			require.True(t, strings.HasPrefix(err.Error(), tc.begins), "%v", err)
			require.ErrorContains(t, err, tc.has)
			require.Equal(t, tc.code == codes.NotFound, crierrors.IsNotFound(err))
			require.Equal(t, tc.name == "unavailable", errors.Is(err, crierrors.ErrRegistryUnavailable))
		})
	}
}
