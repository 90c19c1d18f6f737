package etcd_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"knarr/store"
	"knarr/store/storetest"
)

// TestSyncSeesOthersWrites reads through one store what another has just been told is written.
func TestSyncSeesOthersWrites(t *testing.T) {
	_, stores, tables, _ := openTwo(t, newServer(t, "-no-fsync"))
	require.True(t, stores[0].Shared())
	key, expect, late := storetest.Pods+"default/x", int64(0), 0
	for i := range 300 {
		recs, err := stores[0].Txn(t.Context(), store.Op{Table: tables[0], Key: key, Object: storetest.Object("x", strconv.Itoa(i)), Expect: expect})
		require.NoError(t, err)
		expect = recs[0].Revision
		if r := tables[1].Get(key); r == nil || r.Revision < expect {
			late++
		}
		require.NoError(t, stores[1].Sync(t.Context()))
		require.Equal(t, strconv.Itoa(i), storetest.Content(tables[1].Get(key)))
	}
	require.NotZero(t, late, "the other store was never behind: this test shows nothing")
}

// TestSyncSharesRequests counts, at etcd, the requests of many readers at once.
func TestSyncSharesRequests(t *testing.T) {
	s := newServer(t, "-no-fsync")
	_, stores, _, _ := openTwo(t, s)
	const readers, each = 200, 20
	before := rangeRequests(t, s)
	var all sync.WaitGroup
	for range readers {
		all.Go(func() {
			for range each {
				if err := stores[0].Sync(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	require.Less(t, rangeRequests(t, s)-before, readers*each/10)
}

// rangeRequests is how many reads etcd has answered.
func rangeRequests(t *testing.T, s *server) int {
	t.Helper()
	resp, err := http.Get(s.url + "/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "} ")
		if strings.HasPrefix(name, "grpc_server_handled_total") && strings.Contains(name, `grpc_code="OK"`) && strings.Contains(name, `grpc_method="Range"`) {
			n, err := strconv.ParseFloat(value, 64)
			require.NoError(t, err)
			return int(n)
		}
	}
	t.Fatal("etcd does not count its reads")
	return 0
}

func TestCheckTellsWhatIsWrong(t *testing.T) {
	s := newServer(t, "-no-fsync")
	engine, err := open(s)
	require.NoError(t, err)
	st, _ := openOn(t, engine)
	require.NoError(t, st.Check(t.Context()))

	alarm := func(action pb.AlarmRequest_AlarmAction) {
		member := newClient(t, s)
		status, err := member.Status(t.Context(), s.url)
		require.NoError(t, err)
		_, err = pb.NewMaintenanceClient(member.ActiveConnection()).Alarm(t.Context(),
			&pb.AlarmRequest{Action: action, MemberID: status.Header.MemberId, Alarm: pb.AlarmType_NOSPACE})
		require.NoError(t, err)
	}
	alarm(pb.AlarmRequest_ACTIVATE)
	require.ErrorContains(t, st.Check(t.Context()), "raise its quota")
	alarm(pb.AlarmRequest_DEACTIVATE)
	require.NoError(t, st.Check(t.Context()))

	address := s.address()
	s.kill()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err = st.Check(ctx)
	var away *store.UnavailableError
	require.True(t, errors.As(err, &away), fmt.Sprint(err))
	require.ErrorContains(t, err, address)
	s.start(address)
	waitFor(t, func() bool { return st.Check(t.Context()) == nil })
}
